// The classes Spill and Record of the module fedcore._core: what outlives a killed process.

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "base/error.hpp"
#include "collect/record.hpp"
#include "collect/spill.hpp"
#include "python/bindings.hpp"

namespace fedcore {
namespace {

using Key = std::array<std::uint8_t, 64>;
using PySource = std::tuple<std::string, py::bytes, py::int_>;

Key to_key(const py::bytes& key) {
  const std::string_view text = key;
  Key out;
  if (text.size() != out.size()) {
    throw Error(Errc::kProtocol, "a key has 64 bytes, got " + std::to_string(text.size()));
  }
  std::copy(text.begin(), text.end(), out.begin());
  return out;
}

std::shared_ptr<Record> create(const std::string& path, const py::bytes& key,
                               const std::vector<PySource>& sources, std::uint64_t chunk_count) {
  std::vector<Record::Source> checked;
  for (const auto& [site, set, weight] : sources) {
    checked.push_back({site, to_set_id(set), static_cast<double>(to_weights({weight})[0])});
  }
  return Record::create(path, to_key(key), std::move(checked), chunk_count);
}

py::list sources_of(const Record& record) {
  py::list out;
  for (const Record::Source& source : record.sources()) {
    out.append(py::make_tuple(source.site, from_set_id(source.set),
                              static_cast<std::uint64_t>(source.weight)));
  }
  return out;
}

}  // namespace

void bind_resume(py::module_& m) {
  py::class_<Spill, std::shared_ptr<Spill>>(
      m, "Spill",
      "A file for chunks that came before they can be reduced: made when it is needed, reused, and "
      "removed with the object. What a killed process left is taken up.")
      .def(py::init<std::string, std::uint64_t, std::uint64_t, std::uint64_t>(), py::arg("path"),
           py::arg("slot_bytes"), py::arg("keep_free") = 0,
           py::arg("extent_bytes") = Spill::kExtentBytes)
      .def(
          "begin", [](Spill& spill, const py::bytes& key) { spill.begin(to_key(key)); },
          py::arg("key"),
          "Say with 64 bytes what the next chunks are of; those that a killed process left of "
          "anything else are given up.")
      .def_property_readonly("used", &Spill::used, "Chunks in the file.")
      .def_property_readonly("file_bytes", &Spill::file_bytes);
  py::class_<Record, std::shared_ptr<Record>>(
      m, "Record", "The record, in a file, of which chunks of a collection's output are reduced.")
      .def_static("create", &create, py::arg("path"), py::arg("key"), py::arg("sources"),
                  py::arg("chunk_count"),
                  "Begin a record in place of what is there: key says with 64 bytes what is "
                  "collected, sources = [(site, set id, weight)] of whom.")
      .def_static("open", &Record::open, py::arg("path"),
                  "Return the record that a process left; None where there is none that is whole.")
      .def_property_readonly("key",
                             [](const Record& p) {
                               return py::bytes(reinterpret_cast<const char*>(p.key().data()),
                                                p.key().size());
                             })
      .def_property_readonly("sources", &sources_of)
      .def_property_readonly("chunk_count", &Record::chunk_count)
      .def("at", &Record::at, py::arg("index"),
           "The checksum of a chunk that is in the output; None for one that isn't.");
}

}  // namespace fedcore
