// The core's error codes and its one exception type.
//
// Configuration, input and I/O errors are thrown as Error; the bindings hold the only translator
// and map each code to a class of fedcore.errors. Frames from the network never throw: a bad frame
// is a verdict (see exchange.hpp), because remote input must not be able to end a process.
#pragma once

#include <stdexcept>
#include <string>

namespace fedcore {

enum class Errc {
  kConfig,     // a setting is wrong
  kLayout,     // a tensor set cannot be described, or two of them differ
  kProtocol,   // a message breaks the wire format
  kNonFinite,  // NaN or infinity where a finite value is needed
  kWeight,     // a weight out of range
  kStorage,    // a file could not be created, mapped, written or synchronised
  kClosed,     // the object was closed
  kRule,       // a rule has failed, or broke its contract
};

class Error : public std::runtime_error {
 public:
  Error(Errc code, const std::string& message) : std::runtime_error(message), code_(code) {}
  Errc code() const noexcept { return code_; }

 private:
  Errc code_;
};

}  // namespace fedcore
