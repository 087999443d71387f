// Reducer: K chunks of one layout -> one chunk, in one pass.
//
// Owns the weights and their sum. Inputs are always summed in the order given at construction, so
// the result does not depend on arrival. reduce() is not reentrant (it uses scratch of its own):
// one thread at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "codec/codec.hpp"
#include "codec/run_reader.hpp"
#include "format/layout.hpp"

namespace fedcore {

// The first non-finite value of a block: which input, and its flat byte offset.
struct BadValue {
  std::size_t source;
  std::uint64_t byte_offset;
};

class Reducer {
 public:
  // Throws Error{kWeight} unless kernels::is_weight() holds for every weight and there is at least
  // one.
  explicit Reducer(const std::vector<std::uint64_t>& weights);

  std::size_t sources() const noexcept { return weights_.size(); }

  // Averages the flat bytes of `range`, which inputs hold as they are or as an encoded body of one
  // chunk, the difference to `base`. base (or nullptr) and out point at the range's first byte.
  // What is encoded is decoded on the device, if one is in use that can, else a piece at a time,
  // into the cache. Returns a non-finite input value, in which case `out` is not to be used.
  std::optional<BadValue> reduce(const Layout& layout, Range range, const Body* inputs,
                                 const std::uint8_t* base, std::uint8_t* out);

  // The same with one input after the other, from input 0 on, for a range whose inputs are not
  // there together; `out` collects what is not averaged. A non-finite input changes nothing.
  // finish() follows the last input and writes the bits that reduce() gives.
  std::optional<BadValue> fold(const Layout& layout, Range range, std::size_t source,
                               const Body& input, const std::uint8_t* base, std::uint8_t* out);
  void finish(const Layout& layout, Range range, std::uint8_t* out);

 private:
  std::optional<BadValue> reduce_pieces(const Run& run, const Body* inputs,
                                        const std::uint8_t* base, std::uint8_t* out);
  std::optional<BadValue> find_bad(Dtype dtype, std::uint64_t offset, std::uint64_t nbytes) const;
  void fold_pieces(const Run& run, std::size_t source, Scheme scheme, const std::uint8_t* body,
                   const std::uint8_t* base, double* sums);

  std::vector<double> weights_;
  double total_ = 0;
  std::vector<const std::uint8_t*> bodies_;  // where the run at hand begins in each input
  std::vector<const void*> pointers_;        // the block that is averaged
  std::vector<std::uint8_t> encodings_;      // of the run at hand in each input
  std::vector<RunReader> readers_;           // of the inputs that the run at hand is encoded in
  std::vector<std::uint8_t> pieces_;         // what those hold, decoded
  std::vector<double> sums_;                 // of fold()
};

}  // namespace fedcore
