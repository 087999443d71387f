// The module fedcore._core, but for the other files bindings_*.cpp. Converts arguments, releases
// the GIL around work, and maps the core's one exception type to the classes of
// fedcore.errors.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "format/flat_writer.hpp"
#include "format/layout.hpp"
#include "kernels/kernels.hpp"
#include "python/bindings.hpp"
#include "reduce/families.hpp"
#include "reduce/files.hpp"
#include "transfer/exchange.hpp"
#include "transfer/sink.h"

using namespace fedcore;

namespace fedcore {

wire::SetId to_set_id(const py::bytes& id) {
  const std::string_view text = id;
  if (text.size() != 16) {
    throw Error(Errc::kProtocol, "a set id has 16 bytes, got " + std::to_string(text.size()));
  }
  wire::SetId out;
  std::memcpy(out.data(), text.data(), 16);
  return out;
}

py::bytes from_set_id(const wire::SetId& id) {
  return {reinterpret_cast<const char*>(id.data()), id.size()};
}

std::vector<std::uint64_t> to_weights(const std::vector<py::int_>& weights) {
  std::vector<std::uint64_t> out;
  for (const py::int_& weight : weights) {
    std::uint64_t value = PyLong_AsUnsignedLongLong(weight.ptr());
    if (PyErr_Occurred() != nullptr) {  // negative, or more than 64 bits
      PyErr_Clear();
      value = 0;
    }
    if (!kernels::is_weight(value)) {
      throw Error(Errc::kWeight,
                  "weight " + std::string(py::str(weight)) + ": expected " + kernels::kWeightRule);
    }
    out.push_back(value);
  }
  return out;
}

py::memoryview view_of(std::shared_ptr<MappedFile> file, std::uint64_t offset,
                       std::optional<std::uint64_t> length) {
  if (!length) {
    file->check_range(offset, 0);
    length = file->size() - offset;
  }
  file->check_range(offset, *length);
  return py::memoryview(py::cast(FileView{std::move(file), offset, *length}));
}

}  // namespace fedcore

namespace {

constexpr std::size_t kReleaseGil = 64 << 10;

void raise_rule_error(const RuleError& error, const py::object& tensor) {
  const py::object type = py::module_::import("fedcore.errors").attr("RuleError");
  const py::object raised = type(error.what(), tensor, error.element(), error.trace());
  PyErr_SetObject(type.ptr(), raised.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) {
      std::rethrow_exception(pointer);
    }
  } catch (const FileRuleError& error) {
    raise_rule_error(error, py::int_(error.tensor()));
  } catch (const RuleError& error) {
    raise_rule_error(error, py::none());
  } catch (const Error& error) {
    const char* name = nullptr;
    switch (error.code()) {
      case Errc::kConfig:
        name = "ConfigError";
        break;
      case Errc::kLayout:
        name = "LayoutError";
        break;
      case Errc::kProtocol:
        name = "ProtocolError";
        break;
      case Errc::kNonFinite:
        name = "NonFiniteError";
        break;
      case Errc::kWeight:
        name = "WeightError";
        break;
      case Errc::kStorage:
        name = "StorageError";
        break;
      case Errc::kClosed:
        name = "ClosedError";
        break;
      case Errc::kRule:
        name = "RuleError";
        break;
    }
    const py::object type = py::module_::import("fedcore.errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
  }
}

using PySpec = std::tuple<std::string, std::string, std::vector<std::int64_t>>;

PyLayout make_layout(const std::vector<PySpec>& tensors, std::uint64_t chunk_bytes) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, dtype, shape] : tensors) {
    try {
      specs.push_back({name, parse_dtype(dtype), shape});
    } catch (const Error& error) {
      throw Error(error.code(), "tensor '" + name + "': " + error.what());
    }
  }
  return std::make_shared<Layout>(std::move(specs), chunk_bytes);
}

py::list layout_tensors(const Layout& layout) {
  py::list out;
  for (const Tensor& t : layout.tensors()) {
    out.append(py::make_tuple(t.name, std::string(dtype_name(t.dtype)),
                              py::tuple(py::cast(t.shape)), t.offset, t.nbytes));
  }
  return out;
}

void mean_block(const std::string& dtype_text, const std::vector<py::buffer>& inputs,
                const std::vector<py::int_>& weights, const py::buffer& out,
                const std::optional<py::buffer>& base) {
  const Dtype dtype = parse_dtype(dtype_text);
  const std::vector<std::uint64_t> checked = to_weights(weights);
  if (checked.size() != inputs.size()) {
    throw Error(Errc::kWeight, "there must be one weight per input");
  }
  check_weights(kMean, checked);
  const Bytes result(out, true);
  std::vector<std::unique_ptr<Bytes>> held;
  std::vector<const void*> pointers;
  std::vector<double> factors(checked.begin(), checked.end());
  double total = 0;
  for (const double factor : factors) {
    total += factor;
  }
  for (const py::buffer& input : inputs) {
    held.push_back(std::make_unique<Bytes>(input));
    pointers.push_back(held.back()->data());
  }
  if (base) {
    held.push_back(std::make_unique<Bytes>(*base));
  }
  for (const auto& bytes : held) {
    if (bytes->size() != result.size() || result.size() % item_size(dtype) != 0) {
      throw Error(Errc::kLayout,
                  "inputs, base and output must have the same whole number of elements");
    }
  }
  bool finite = true;
  {
    const py::gil_scoped_release release;
    finite = kernels::mean(dtype, pointers.data(), factors.data(), factors.size(), total,
                           base ? held.back()->data() : nullptr, result.data(), result.size());
  }
  for (std::size_t k = 0; !finite && k < pointers.size(); ++k) {
    const std::int64_t at = kernels::find_non_finite(dtype, pointers[k], result.size());
    if (at >= 0) {
      throw Error(Errc::kNonFinite, "NaN or infinity in input " + std::to_string(k) + ", element " +
                                        std::to_string(at));
    }
  }
}

// What a rule's Combiner makes of whole buffers before the rounding; for tests.
void combine_wide(const py::object& rule_object, const std::string& dtype_text,
                  const std::vector<py::buffer>& inputs, const std::vector<py::int_>& weights,
                  const py::buffer& out) {
  const std::shared_ptr<const Rule> rule = to_rule(rule_object);
  const Dtype dtype = parse_dtype(dtype_text);
  const std::vector<std::uint64_t> checked = to_weights(weights);
  check_weights(*rule, checked);
  const Bytes result(out, true);
  const std::size_t count = result.size() / sizeof(double);
  std::vector<std::unique_ptr<Bytes>> held;
  std::vector<const void*> pointers;
  for (const py::buffer& input : inputs) {
    held.push_back(std::make_unique<Bytes>(input));
    pointers.push_back(held.back()->data());
    if (held.back()->size() != count * item_size(dtype)) {
      throw Error(Errc::kLayout, "inputs and output must have the same number of elements");
    }
  }
  if (checked.size() != inputs.size() || !is_float(dtype)) {
    throw Error(Errc::kLayout, "there must be one weight per input of a float dtype");
  }
  const auto combiner = rule->make({checked.begin(), checked.end()});
  if (!combiner->combine_wide(dtype, pointers.data(), reinterpret_cast<double*>(result.data()),
                              count)) {
    throw Error(Errc::kNonFinite, "NaN or infinity in an input");
  }
}

using PyFileTensor =
    std::tuple<std::string, std::uint64_t, std::vector<std::uint64_t>, std::uint64_t>;

py::object py_reduce_files(const std::vector<FileHandle*>& inputs,
                           const std::vector<py::int_>& weights,
                           const std::vector<PyFileTensor>& tensors, const FileHandle& out,
                           unsigned threads,
                           const std::optional<std::function<void(std::uint64_t)>>& progress,
                           const py::object& rule_object) {
  const std::shared_ptr<const Rule> rule = to_rule(rule_object);
  std::vector<std::shared_ptr<MappedFile>> files;
  for (const FileHandle* input : inputs) {
    files.push_back(input->share());
  }
  std::vector<FileTensor> jobs;
  for (const auto& [dtype, nbytes, offsets, out_offset] : tensors) {
    jobs.push_back({parse_dtype(dtype), nbytes, offsets, out_offset});
  }
  const std::vector<std::uint64_t> checked = to_weights(weights);
  const auto report = [&](std::uint64_t bytes) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
    if (progress) {
      (*progress)(bytes);
    }
  };
  std::optional<FileBadValue> bad;
  {
    const py::gil_scoped_release release;
    bad = reduce_files(files, checked, jobs, out.share(), *rule, threads, report);
    for (const auto& file : files) {
      file->check_whole();
    }
  }
  if (!bad) {
    return py::none();
  }
  return py::make_tuple(bad->source, bad->tensor, bad->element);
}

void bind_files(py::module_& m) {
  py::class_<FileView>(m, "_FileView", py::buffer_protocol(), py::module_local())
      .def_buffer([](FileView& v) {
        return py::buffer_info(v.file->data() + v.offset, 1, "B", 1,
                               {static_cast<py::ssize_t>(v.length)}, {1}, !v.file->writable());
      });
  py::class_<FileHandle>(m, "MappedFile",
                         "A memory-mapped file, or anonymous memory with the same interface.")
      .def_static(
          "create",
          [](const std::string& path, std::uint64_t size) {
            return FileHandle{MappedFile::create(path, size)};
          },
          py::arg("path"), py::arg("size"),
          "Create a file of `size` zero bytes, reserving the space; StorageError if it exists or "
          "the disk is full.")
      .def_static(
          "open",
          [](const std::string& path, bool writable) {
            return FileHandle{MappedFile::open(path, writable)};
          },
          py::arg("path"), py::arg("writable") = false, "Map an existing file.")
      .def_static(
          "anonymous", [](std::uint64_t size) { return FileHandle{MappedFile::anonymous(size)}; },
          py::arg("size"), "Map `size` zero bytes of memory.")
      .def(
          "check_whole", [](const FileHandle& h) { h.get().check_whole(); },
          "StorageError if bytes that were read were gone: the file has become shorter.")
      .def_property_readonly("size", [](const FileHandle& h) { return h.get().size(); })
      .def_property_readonly("path", [](const FileHandle& h) { return h.get().path(); })
      .def(
          "view",
          [](const FileHandle& h, std::uint64_t offset, std::optional<std::uint64_t> length) {
            return view_of(h.share(), offset, length);
          },
          py::arg("offset") = 0, py::arg("length") = std::nullopt,
          "Return bytes as a memoryview that keeps the mapping alive; read-only unless the file is "
          "writable.")
      .def(
          "release",
          [](const FileHandle& h, std::uint64_t o, std::uint64_t n) { h.get().release(o, n); },
          py::arg("offset"), py::arg("length"),
          "Drop whole pages of a range from memory; the file keeps them.")
      .def(
          "write",
          [](const FileHandle& h, std::uint64_t offset, const py::buffer& data) {
            const auto file = h.share();
            const Bytes bytes(data);
            const py::gil_scoped_release release;
            file->write(offset, bytes.data(), bytes.size());
          },
          py::arg("offset"), py::arg("data"),
          "Copy bytes into the file without touching the mapping; StorageError if it fails.")
      .def(
          "evict", [](const FileHandle& h) { h.get().evict(); },
          "Let the system forget its cached copy, once nobody is going to read it soon.")
      .def(
          "sync", [](const FileHandle& h) { h.get().sync(); },
          py::call_guard<py::gil_scoped_release>(),
          "Write everything back to the device (msync and fsync).")
      .def(
          "close", [](FileHandle& h) { h.file.reset(); },
          "Drop this handle; the memory goes with the last view or user.");
  py::class_<FlatWriter>(m, "FlatWriter",
                         "Writes flat bytes to a file from first to last, and takes the checksums "
                         "of their chunks on the way.")
      .def(py::init([](const FileHandle& h, std::uint64_t offset, std::uint64_t length,
                       std::uint64_t chunk_bytes) {
             return FlatWriter(h.share(), offset, length, chunk_bytes);
           }),
           py::arg("file"), py::arg("offset"), py::arg("length"), py::arg("chunk_bytes"))
      .def(
          "write",
          [](FlatWriter& writer, const py::buffer& data) {
            const Bytes bytes(data);
            const py::gil_scoped_release release;
            writer.write(bytes.data(), bytes.size());
          },
          py::arg("data"),
          "Append bytes; LayoutError if they are more than the rest, StorageError if it fails.")
      .def("checksums", &FlatWriter::checksums,
           "CRC-32C of every chunk; LayoutError before the last byte.");
}

void bind_layout(py::module_& m) {
  py::class_<Layout, PyLayout>(
      m, "Layout",
      "A tensor table in canonical order (item size descending, then name), its flat bytes "
      "and its chunk grid.")
      .def(py::init(&make_layout), py::arg("tensors"), py::arg("chunk_bytes") = 1 << 20)
      .def_property_readonly("total_bytes", &Layout::total_bytes)
      .def_property_readonly("chunk_bytes", &Layout::chunk_bytes)
      .def_property_readonly("chunk_count", &Layout::chunk_count)
      .def_property_readonly("tensor_count", [](const Layout& l) { return l.tensors().size(); })
      .def_property_readonly("tensors", &layout_tensors,
                             "(name, dtype, shape, offset, nbytes) in canonical order.")
      .def(
          "chunk_range",
          [](const Layout& layout, std::uint64_t index) {
            const Range range = layout.chunk_range(index);
            return py::make_tuple(range.offset, range.nbytes);
          },
          py::arg("index"), "Flat offset and length in bytes of a chunk.")
      .def(
          "locate",
          [](const Layout& layout, std::uint64_t offset) {
            const Location where = layout.locate(offset);
            return py::make_tuple(std::string(where.tensor), where.element);
          },
          py::arg("byte_offset"), "Tensor name and element index that hold a flat byte.");
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "The compiled core of fedcore: layouts, mapped files, the reducer and the data plane.";
  py::register_exception_translator(&translate);
  m.def(
      "simd_level", [] { return std::string(kernels::active().name); },
      "Instruction set of the kernels in use.");
  m.def("simd_levels", &kernels::available, "Instruction sets that this CPU can run.");
  m.def(
      "set_simd_level", [](const std::string& level) { kernels::select(level); }, py::arg("level"),
      "Switch the kernels of this process; for tests.");
  m.def(
      "same_bytes",
      [](const py::buffer& one, const py::buffer& other) {
        const Bytes a(one), b(other);
        const py::gil_scoped_release release;
        return a.size() == b.size() &&
               (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size()) == 0);
      },
      py::arg("one"), py::arg("other"), "Whether two contiguous buffers hold the same bytes.");
  m.def(
      "set_device",
      [](const std::optional<py::capsule>& device) {
        if (device &&
            (device->name() == nullptr || std::string_view(device->name()) != FC_DEVICE_CAPSULE)) {
          throw Error(Errc::kConfig, "a device must be a capsule of " FC_DEVICE_CAPSULE
                                     ", as this version has it");
        }
        kernels::use_device(device ? device->get_pointer<const FcDevice>() : nullptr);
      },
      py::arg("device").none(true),
      "Compute means on a device (a capsule of FC_DEVICE_CAPSULE) where it can, or None: on the "
      "CPU.");
  m.def(
      "crc32c",
      [](const py::buffer& data, std::uint32_t seed) {
        const Bytes bytes(data);
        if (bytes.size() < kReleaseGil) {
          return crc32c(bytes.data(), bytes.size(), seed);
        }
        const py::gil_scoped_release release;
        return crc32c(bytes.data(), bytes.size(), seed);
      },
      py::arg("data"), py::arg("seed") = 0,
      "CRC-32C (RFC 3720) of a buffer, continuing from `seed`.");
  m.def(
      "crc32c_by_each_path",
      [](const py::buffer& data, std::uint32_t seed) {
        const Bytes bytes(data);
        return crc32c_by_each_path(bytes.data(), bytes.size(), seed);
      },
      py::arg("data"), py::arg("seed") = 0,
      "The checksum by each path that this CPU has, the table first; for tests.");
  m.def(
      "chunk_checksums",
      [](const FileHandle& handle, std::uint64_t offset, std::uint64_t length,
         std::uint64_t chunk_bytes) {
        const auto file = handle.share();
        file->check_range(offset, length);
        std::vector<std::uint32_t> crcs;
        const py::gil_scoped_release release;
        for (std::uint64_t at = 0; at < length; at += chunk_bytes) {
          const std::uint64_t size = std::min(chunk_bytes, length - at);
          file->populate(offset + at, size);
          crcs.push_back(crc32c(file->data() + offset + at, size));
          file->release(offset + at, size);
        }
        file->check_whole();
        return crcs;
      },
      py::arg("file"), py::arg("offset"), py::arg("length"), py::arg("chunk_bytes"),
      "CRC-32C of every chunk of a range of a file, as publish() takes them.");
  m.def(
      "find_non_finite",
      [](const std::string& dtype, const py::buffer& data) {
        const Dtype kind = parse_dtype(dtype);
        const Bytes bytes(data);
        const py::gil_scoped_release release;
        return kernels::find_non_finite(kind, bytes.data(), bytes.size());
      },
      py::arg("dtype"), py::arg("data"),
      "Index of the first NaN or infinity among the elements of a block, or -1.");
  m.def("mean", &mean_block, py::arg("dtype"), py::arg("inputs"), py::arg("weights"),
        py::arg("out"), py::arg("base") = std::nullopt,
        "Weighted mean of flat blocks of one dtype into `out`; integers and booleans are copied "
        "from `base`, or from "
        "the first input. NonFiniteError names the input and element.");
  bind_layout(m);
  bind_codec(m);
  bind_files(m);
  m.def(
      "rules",
      [] {
        py::list out;
        for (const Rule* const rule : rules()) {
          const Traits& traits = rule->traits;
          out.append(
              py::make_tuple(std::string(rule->name), rule->version, traits.weighted,
                             traits.symmetric, traits.folds, traits.least,
                             std::vector<std::string>(rule->options.begin(), rule->options.end())));
        }
        return out;
      },
      "The rules of the core: (name, version, weighted, symmetric, folds, least sources, "
      "names of options).");
  m.def(
      "combine_wide", &combine_wide, py::arg("rule"), py::arg("dtype"), py::arg("inputs"),
      py::arg("weights"), py::arg("out"),
      "Combine whole buffers by a rule into binary64 numbers, as a finisher gets them; for tests.");
  m.def(
      "survey_scratch",
      [](std::size_t sources, std::uint64_t chunk_bytes) {
        return ChunkSurvey::scratch(sources + 1, chunk_bytes);
      },
      py::arg("sources"), py::arg("chunk_bytes"),
      "Bytes that a thread takes which measures chunks of so many sources, and of the base.");
  m.def(
      "rule_scratch",
      [](const py::object& rule, std::size_t sources) { return to_rule(rule)->scratch(sources); },
      py::arg("rule"), py::arg("sources"),
      "Bytes of scratch memory that each thread of a rule takes for so many sources.");
  m.def(
      "reduce_files", &py_reduce_files, py::arg("inputs"), py::arg("weights"), py::arg("tensors"),
      py::arg("out"), py::arg("threads") = 1, py::arg("progress") = std::nullopt,
      py::arg("rule") = "mean",
      "Combine tensors of mapped files by a rule: tensors = [(dtype, nbytes, input offsets, output "
      "offset)]. Returns None, or "
      "(input, tensor, element) of the first non-finite value.");
  bind_resume(m);
  bind_rules(m);
  bind_finishing(m);
  bind_factors(m);
  bind_events(m);
  bind_exchange(m);
}
