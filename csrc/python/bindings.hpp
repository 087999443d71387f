// What the files of the module fedcore._core share; only bindings*.cpp may include it. It and they
// alone have a Python header.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "codec/codec.hpp"
#include "format/layout.hpp"
#include "format/wire.hpp"
#include "reduce/finish.hpp"
#include "reduce/rule.hpp"
#include "transfer/exchange.hpp"

namespace fedcore {

namespace py = pybind11;

// A contiguous buffer for the length of a call.
class Bytes {
 public:
  explicit Bytes(const py::buffer& buffer, bool writable = false) {
    if (PyObject_GetBuffer(buffer.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      throw py::error_already_set();
    }
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  std::uint8_t* data() const { return static_cast<std::uint8_t*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

// The handle that Python holds. close() drops it; views and the core keep the mapping for
// themselves.
struct FileHandle {
  std::shared_ptr<MappedFile> file;
  MappedFile& get() const {
    if (!file) {
      throw Error(Errc::kClosed, "the mapped file is closed");
    }
    return *file;
  }
  std::shared_ptr<MappedFile> share() const {
    get();
    return file;
  }
};

// Exports a range through the buffer protocol and keeps its mapping alive.
struct FileView {
  std::shared_ptr<MappedFile> file;
  std::uint64_t offset;
  std::uint64_t length;
};

// A view of a range, to the file's end without a length; throws Error{kStorage} beyond the file.
py::memoryview view_of(std::shared_ptr<MappedFile> file, std::uint64_t offset,
                       std::optional<std::uint64_t> length);

using PyLayout = std::shared_ptr<Layout>;
// Where the flat bytes of states lie, by name.
using PyStates = std::map<std::string, std::tuple<FileHandle*, std::uint64_t>>;

// Throw Error{kProtocol, kWeight} for an id that has not 16 bytes, and a weight out of range.
wire::SetId to_set_id(const py::bytes& id);
py::bytes from_set_id(const wire::SetId& id);
std::vector<std::uint64_t> to_weights(const std::vector<py::int_>& weights);

// A codec for the core alone, of the same settings as a Codec of Python's; nothing for None.
std::shared_ptr<Codec> codec_of(const py::object& codec);

std::map<std::string, StatePlace> to_states(const PyStates& states);

// Adds the class Codec; Layout must be there.
void bind_codec(py::module_& m);
// An exchange's event as the object of its class, and the classes.
py::object to_python(const Event& event);
void bind_events(py::module_& m);
// Adds the classes CollectorOptions, Collector and Exchange; those of their arguments must be there.
void bind_exchange(py::module_& m);
// The rule of an object of the class LoraRule; nullptr for any other.
std::shared_ptr<const Rule> lora_rule_of(const py::object& rule);
// Adds recompress(), factor_error() and the class LoraRule; Layout must be there.
void bind_factors(py::module_& m);
// Adds the class Finisher; Layout and MappedFile must be there.
void bind_finishing(py::module_& m);
// A rule by its name, a pair of a name and a dict of its options, or an object of the class PythonRule
// WeighedRule or LoraRule.
// Throws what find_rule() and rule_with() throw.
std::shared_ptr<const Rule> to_rule(const py::object& rule);
// Adds the classes PythonRule and WeighedRule.
void bind_rules(py::module_& m);
// Adds the classes Spill and Record.
void bind_resume(py::module_& m);

}  // namespace fedcore
