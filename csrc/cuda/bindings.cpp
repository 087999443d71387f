// The module fedcore._cuda: finds a GPU and hands it to the core as a capsule. Loaded only when a
// GPU was asked for.

#include <pybind11/pybind11.h>

#include <map>
#include <memory>

#include "base/error.hpp"
#include "cuda/reduce.hpp"

namespace py = pybind11;
using namespace fedcore;

namespace {

// 2 lanes of 2 x 8 MiB: a chunk of each of a few sites fits in one piece.
constexpr std::size_t kPieceBytes = 8u << 20;
constexpr unsigned kLanes = 2;

int mean(void* self, const FcMean* block) {
  return static_cast<cuda::StagedDevice*>(self)->mean(*block);
}

struct Opened {
  cuda::OpenDevice gpu;
  FcDevice table;
};

// Stays open to the end of the process, as the core demands; the GIL guards it.
Opened& open_device(int index) {
  static auto& opened = *new std::map<int, Opened>();
  auto found = opened.find(index);
  if (found == opened.end()) {
    try {
      const cuda::OpenDevice gpu = cuda::open_device(index, kPieceBytes, kLanes);
      found = opened.emplace(index, Opened{gpu, {gpu.device, &mean}}).first;
    } catch (const Error& error) {
      throw py::value_error(error.what());
    }
  }
  return found->second;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Means on an NVIDIA GPU, with the bits of the CPU.";
  m.def(
      "device_count",
      [] {
        std::string why;
        const int count = cuda::device_count(why);
        return py::make_tuple(count, why);
      },
      "The number of GPUs, and why there is none.");
  py::class_<Opened, std::unique_ptr<Opened, py::nodelete>>(m, "Device", "An open GPU.")
      .def_property_readonly("name", [](const Opened& d) { return d.gpu.name; })
      .def_property_readonly(
          "blocks", [](const Opened& d) { return d.gpu.device->blocks(); },
          "Blocks that this GPU has averaged.")
      .def_property_readonly(
          "failure", [](const Opened& d) { return d.gpu.device->failure(); },
          "What ended its use, after which the CPU went on; empty if nothing did.")
      .def(
          "capsule",
          [](const Opened& d) {
            return py::capsule(static_cast<const void*>(&d.table), FC_DEVICE_CAPSULE);
          },
          "What fedcore._core.set_device takes.");
  m.def("open_device", &open_device, py::arg("index") = 0, py::return_value_policy::reference,
        "Open a GPU for means; ValueError says why it can't be used.");
}
