// What the files of the module fedcore._core share; only bindings*.cpp may include it. It and they
// alone have a Python header.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "codec.hpp"
#include "wire.hpp"

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

// Throw Error{kProtocol, kWeight} for an id that has not 16 bytes, and a weight out of range.
wire::SetId to_set_id(const py::bytes& id);
py::bytes from_set_id(const wire::SetId& id);
std::vector<std::uint32_t> to_weights(const std::vector<py::int_>& weights);

// A codec for the core alone, of the same settings as a Codec of Python's; nothing for None.
std::shared_ptr<Codec> codec_of(const py::object& codec);

// Adds the class Codec; Layout must be there.
void bind_codec(py::module_& m);
// Adds the classes Spill and Progress.
void bind_resume(py::module_& m);

}  // namespace fedcore
