// The module fedcore._core, but for bindings_codec.cpp and bindings_resume.cpp. Converts arguments,
// releases the GIL around work, and maps the core's one exception type to the classes of
// fedcore.errors.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "bindings.hpp"
#include "crc32c.hpp"
#include "error.hpp"
#include "exchange.hpp"
#include "flat_writer.hpp"
#include "kernels.hpp"
#include "layout.hpp"
#include "mapped_file.hpp"
#include "reducer.hpp"
#include "sink.h"

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

std::vector<std::uint32_t> to_weights(const std::vector<py::int_>& weights) {
  std::vector<std::uint32_t> out;
  for (const py::int_& weight : weights) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(weight.ptr(), &overflow);
    if (overflow != 0 || value < 1 || value > kernels::kMaxWeight) {
      throw Error(Errc::kWeight, "weight " + std::string(py::str(weight)) +
                                     ": expected an integer from 1 to " +
                                     std::to_string(kernels::kMaxWeight));
    }
    out.push_back(static_cast<std::uint32_t>(value));
  }
  return out;
}

}  // namespace fedcore

namespace {

constexpr std::size_t kReleaseGil = 64 << 10;

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) {
      std::rethrow_exception(pointer);
    }
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
    }
    const py::object type = py::module_::import("fedcore.errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
  }
}

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

py::memoryview view_of(std::shared_ptr<MappedFile> file, std::uint64_t offset,
                       std::optional<std::uint64_t> length) {
  if (!length) {
    file->check_range(offset, 0);
    length = file->size() - offset;
  }
  file->check_range(offset, *length);
  return py::memoryview(py::cast(FileView{std::move(file), offset, *length}));
}

using PySpec = std::tuple<std::string, std::string, std::vector<std::int64_t>>;
using PyLayout = std::shared_ptr<Layout>;

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
  const std::vector<std::uint32_t> checked = to_weights(weights);
  if (checked.size() != inputs.size()) {
    throw Error(Errc::kWeight, "there must be one weight per input");
  }
  const Reducer reducer(checked);  // its constructor checks that there is an input
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

using PyFileTensor =
    std::tuple<std::string, std::uint64_t, std::vector<std::uint64_t>, std::uint64_t>;

py::object py_reduce_files(const std::vector<FileHandle*>& inputs,
                           const std::vector<py::int_>& weights,
                           const std::vector<PyFileTensor>& tensors, const FileHandle& out,
                           unsigned threads,
                           const std::optional<std::function<void(std::uint64_t)>>& progress) {
  std::vector<std::shared_ptr<MappedFile>> files;
  for (const FileHandle* input : inputs) {
    files.push_back(input->share());
  }
  std::vector<FileTensor> jobs;
  for (const auto& [dtype, nbytes, offsets, out_offset] : tensors) {
    jobs.push_back({parse_dtype(dtype), nbytes, offsets, out_offset});
  }
  const std::vector<std::uint32_t> checked = to_weights(weights);
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
    bad = reduce_files(files, checked, jobs, out.share(), threads, report);
  }
  if (!bad) {
    return py::none();
  }
  return py::make_tuple(bad->source, bad->tensor, bad->element);
}

using PySource = std::tuple<py::bytes, py::bytes, py::int_>;

using PyPlace = std::optional<std::tuple<FileHandle*, std::uint64_t>>;

Source to_source(const py::bytes& peer, const py::bytes& set, const py::int_& weight) {
  return {std::string(peer), to_set_id(set), to_weights({weight})[0]};
}

Place to_place(const PyPlace& place) {
  return place ? Place{std::get<0>(*place)->share(), std::get<1>(*place)} : Place{};
}

std::shared_ptr<Collector> open_collector(const PyLayout& layout, std::size_t expected,
                                          const PyPlace& base, std::uint64_t budget_bytes,
                                          bool write_behind, std::shared_ptr<Spill> spill,
                                          std::int64_t spill_after_ms, const py::object& codec) {
  return std::make_shared<Collector>(layout, expected, to_place(base),
                                     CollectorOptions{.budget_bytes = budget_bytes,
                                                      .write_behind = write_behind,
                                                      .spill = std::move(spill),
                                                      .spill_after_ms = spill_after_ms,
                                                      .codec = codec_of(codec)});
}

std::shared_ptr<Collector> make_collector(
    const PyLayout& layout, const std::vector<PySource>& sources, const FileHandle& out,
    std::uint64_t out_offset, const PyPlace& base, std::uint64_t budget_bytes,
    std::int64_t stall_ms, bool check_finite, bool write_behind, std::shared_ptr<Spill> spill,
    std::int64_t spill_after_ms, const py::object& codec, std::shared_ptr<Progress> progress) {
  std::vector<Source> checked;
  for (const auto& [peer, set, weight] : sources) {
    checked.push_back(to_source(peer, set, weight));
  }
  const Place from = to_place(base);
  CollectorOptions options{budget_bytes,     stall_ms,       check_finite,   write_behind,
                           std::move(spill), spill_after_ms, codec_of(codec)};
  const Place to{out.share(), out_offset};
  const py::gil_scoped_release release;  // it reads what is reduced
  return std::make_shared<Collector>(layout, std::move(checked), to, from, std::move(options),
                                     std::move(progress));
}

int deliver(Exchange& exchange, std::int64_t now_ms, const py::bytes& peer,
            const py::buffer& header, const std::optional<py::buffer>& body) {
  const Bytes head(header);
  const Bytes payload(body ? *body : py::buffer(py::bytes("")));
  void* copy = nullptr;
  if (payload.size() > 0) {
    copy = std::malloc(payload.size());
    if (copy == nullptr) {
      throw std::bad_alloc();
    }
    std::memcpy(copy, payload.data(), payload.size());
  }
  Frame frame(copy, payload.size(), copy, std::free);
  const std::string_view from = peer;
  int verdict = 0;
  {
    const py::gil_scoped_release release;
    verdict = exchange.deliver(now_ms, from, head.data(), head.size(), frame);
  }
  return verdict == FC_TAKEN ? FC_DONE : verdict;
}

py::object next_out(Exchange& exchange, std::int64_t now_ms) {
  auto out = exchange.next_out(now_ms);
  if (!out) {
    return py::none();
  }
  const py::bytes header(reinterpret_cast<const char*>(out->header.data()), out->header.size());
  py::object body = py::none();
  if (out->body_size > 0) {
    const auto offset = static_cast<std::uint64_t>(out->body - out->keep->data());
    body = view_of(out->keep, offset, out->body_size);
    body = body.attr("toreadonly")();
  }
  return py::make_tuple(py::bytes(out->peer), header, body);
}

py::object next_event(Exchange& exchange) {
  const auto event = exchange.next_event();
  if (!event) {
    return py::none();
  }
  switch (event->kind) {
    case Event::Kind::kDone:
      return py::make_tuple("done", event->collector);
    case Event::Kind::kRejected:
      return py::make_tuple("rejected", event->collector, event->source, event->code,
                            event->message);
    case Event::Kind::kStalled:
      return py::make_tuple("stalled", event->collector, event->source, event->silent_ms);
    case Event::Kind::kBroken:
      return py::make_tuple("broken", event->collector, event->message);
    case Event::Kind::kNoRoom:
      return py::make_tuple("no-room", event->collector, event->message);
    case Event::Kind::kStranger:
      return py::make_tuple("stranger", py::bytes(event->code));
    case Event::Kind::kCrowded:
      return py::make_tuple("crowded", py::bytes(event->code), event->message);
    case Event::Kind::kFlooded:
      return py::make_tuple("flooded", py::bytes(event->code), event->message);
    case Event::Kind::kMalformed:
      break;
  }
  return py::make_tuple("malformed", py::bytes(event->code), event->message);
}

py::object next_control(Exchange& exchange, std::int64_t now_ms) {
  const auto message = exchange.next_control(now_ms);
  if (!message) {
    return py::none();
  }
  return py::make_tuple(py::bytes(message->peer), py::bytes(message->body));
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

void bind_exchange(py::module_& m) {
  py::class_<Collector, std::shared_ptr<Collector>>(
      m, "Collector",
      "Pulls K published sets of one layout and reduces them into one output, chunk by chunk.")
      .def(py::init(&make_collector), py::arg("layout"), py::arg("sources"), py::arg("out"),
           py::arg("out_offset"), py::arg("base"), py::arg("budget_bytes"),
           py::arg("stall_ms") = 2000, py::arg("check_finite") = true,
           py::arg("write_behind") = false, py::arg("spill") = nullptr,
           py::arg("spill_after_ms") = 250, py::arg("codec") = py::none(),
           py::arg("progress") = nullptr)
      .def_static("open", &open_collector, py::arg("layout"), py::arg("expected"), py::arg("base"),
                  py::arg("budget_bytes"), py::arg("write_behind") = false,
                  py::arg("spill") = nullptr, py::arg("spill_after_ms") = 250,
                  py::arg("codec") = py::none(),
                  "One whose sources are added as they are ready, about `expected` of them: see "
                  "Exchange.add and Exchange.close.")
      .def_property_readonly("id", &Collector::id)
      .def_property_readonly("done", &Collector::done)
      .def_property_readonly("window", &Collector::window)
      .def_property_readonly("bytes_received", &Collector::bytes_received)
      .def_property_readonly("checksums", &Collector::checksums,
                             "CRC-32C of every chunk of the output, once done.")
      .def(
          "progress",
          [](const Collector& c) {
            return py::make_tuple(c.chunks_reduced(), c.chunk_count(), c.chunks_received());
          },
          "(chunks reduced, chunks in all, chunks received per source).");
  py::class_<Exchange>(m, "Exchange",
                       "The data plane of one process: thread-safe, and without I/O of its own.")
      .def(py::init<>())
      .def(
          "publish",
          [](Exchange& e, const py::bytes& id, const FileHandle& file, std::uint64_t offset,
             std::uint64_t length, std::uint64_t chunk_bytes,
             const std::vector<std::uint32_t>& checksums) {
            e.publish(to_set_id(id), file.share(), offset, length, chunk_bytes, checksums);
          },
          py::arg("set_id"), py::arg("file"), py::arg("offset"), py::arg("length"),
          py::arg("chunk_bytes"), py::arg("checksums") = std::vector<std::uint32_t>(),
          "Offer a range of a file as a tensor set; its bytes must not change until it is "
          "withdrawn.")
      .def(
          "publish_encoded",
          [](Exchange& e, const py::bytes& id, const FileHandle& file,
             std::vector<std::uint64_t> offsets, const py::bytes& encodings,
             const std::vector<std::uint32_t>& checksums) {
            const std::string_view bytes = encodings;
            e.publish_encoded(to_set_id(id), file.share(), std::move(offsets),
                              {bytes.begin(), bytes.end()}, checksums);
          },
          py::arg("set_id"), py::arg("file"), py::arg("offsets"), py::arg("encodings"),
          py::arg("checksums") = std::vector<std::uint32_t>(),
          "Offer encoded chunks as a tensor set: chunk i is bytes offsets[i] to offsets[i + 1] of "
          "the file, and encodings[i] its encoding.")
      .def(
          "publish_packed",
          [](Exchange& e, const py::bytes& id, const FileHandle& file, std::uint64_t offset,
             const py::object& codec, const FileHandle& packed,
             const std::vector<std::uint32_t>& checksums) {
            e.publish_packed(to_set_id(id), file.share(), offset,
                             std::make_unique<Packer>(codec_of(codec), packed.share()), checksums);
          },
          py::arg("set_id"), py::arg("file"), py::arg("offset"), py::arg("codec"),
          py::arg("packed"), py::arg("checksums") = std::vector<std::uint32_t>(),
          "Offer the flat bytes of the codec's layout; chunks are compressed when they are first "
          "asked for, where that saves 5 %, and kept in the file `packed`, as large as the set.")
      .def(
          "withdraw", [](Exchange& e, const py::bytes& id) { e.withdraw(to_set_id(id)); },
          py::arg("set_id"))
      .def("published",
           [](const Exchange& e) {
             py::list ids;
             for (const auto& id : e.published()) {
               ids.append(from_set_id(id));
             }
             return ids;
           })
      .def("start", &Exchange::start, py::arg("collector"))
      .def(
          "add",
          [](Exchange& e, const Collector& c, const py::bytes& peer, const py::bytes& set,
             const py::int_& weight) { return e.add(c.id(), to_source(peer, set, weight)); },
          py::arg("collector"), py::arg("peer"), py::arg("set_id"), py::arg("weight"),
          "Pull another source into an open collector; returns its number.")
      .def(
          "close",
          [](Exchange& e, const Collector& c, const std::vector<std::size_t>& sources,
             const FileHandle& out, std::uint64_t out_offset, std::shared_ptr<Progress> progress) {
            e.close(c.id(), sources, Place{out.share(), out_offset}, std::move(progress));
          },
          py::arg("collector"), py::arg("sources"), py::arg("out"), py::arg("out_offset"),
          py::arg("progress") = nullptr,
          "Reduce these sources of an open collector, in this order, into the output; the others "
          "are dropped. The record, if any, is a new one.")
      .def(
          "cancel", [](Exchange& e, const Collector& c) { e.cancel(c.id()); }, py::arg("collector"),
          "Forget a collector; running or done.")
      .def(
          "retry",
          [](Exchange& e, const Collector& c, std::size_t source,
             const std::optional<py::bytes>& peer) {
            e.retry(c.id(), source,
                    peer ? std::optional<std::string>(std::string(*peer)) : std::nullopt);
          },
          py::arg("collector"), py::arg("source"), py::arg("peer") = std::nullopt,
          "Ask again for what is outstanding at a source, perhaps under a new peer id.")
      .def(
          "drop", [](Exchange& e, const Collector& c, std::size_t k) { e.drop(c.id(), k); },
          py::arg("collector"), py::arg("source"),
          "Take a source out of a collection; its result becomes that of the others alone.")
      .def("deliver", &deliver, py::arg("now_ms"), py::arg("peer"), py::arg("header"),
           py::arg("body"),
           "Hand over a received frame: 0 handled, 1 kept, 3 malformed or too much, 4 not heard.")
      .def("next_out", &next_out, py::arg("now_ms"),
           "The next frame to send: (peer, header, body or None), or None.")
      .def("tick", &Exchange::tick, py::arg("now_ms"), py::call_guard<py::gil_scoped_release>(),
           "Run timers; milliseconds until the next one, or -1.")
      .def("next_event", &next_event, "The next event as a tuple, or None.")
      .def("next_control", &next_control, py::arg("now_ms"),
           "The next control message as (peer, body), peer by peer in turn; or None.")
      .def("has_event", &Exchange::has_event,
           "True if there is news that nobody was told of since `listening`.")
      .def("listening", &Exchange::listening, "Be told of the next news by `has_event`.")
      .def(
          "set_limits",
          [](Exchange& e, std::uint64_t outgoing, std::uint64_t control_per_peer,
             std::uint64_t control,
             bool paced) { e.set_limits({outgoing, control_per_peer, control, paced}); },
          py::arg("outgoing"), py::arg("control_per_peer"), py::arg("control"),
          py::arg("paced") = false,
          "Bound, in bytes: published chunks on their way, and control messages that wait; "
          "`paced`: "
          "their rate and the connections of one owner, too.")
      .def_property_readonly(
          "wake_fd", [](Exchange& e) { return e.outgoing().wake_fd(); },
          "Readable when `next_out`, which had nothing, may have something; -1: never.")
      .def("clear_wake", [](Exchange& e) { e.outgoing().clear_wake(); })
      .def_property_readonly(
          "outgoing_bytes", [](Exchange& e) { return e.outgoing().bytes(); },
          "Bytes of published chunks that are resident because they are on their way.")
      .def(
          "mute",
          [](Exchange& e, const py::bytes& peer, std::int64_t until_ms) {
            e.mute(std::string(peer), until_ms);
          },
          py::arg("peer"), py::arg("until_ms"),
          "Hear nothing from any peer of this one's owner before that time.")
      .def(
          "discard", [](Exchange& e, const py::bytes& peer) { e.discard(std::string(peer)); },
          py::arg("peer"), "Throw away what waits of a peer's control messages.")
      .def("heartbeat", &Exchange::heartbeat, py::arg("interval_ms"),
           "Ping peer b'' at this interval; 0: never.")
      .def(
          "last_heard",
          [](const Exchange& e, const py::bytes& peer) { return e.last_heard(std::string(peer)); },
          py::arg("peer"), "Clock of the last frame of a peer, or None.")
      .def(
          "busy_until",
          [](const Exchange& e, const py::bytes& peer) { return e.busy_until(std::string(peer)); },
          py::arg("peer"),
          "Clock until which a peer's silence may mean that a chunk is on its way; 0: it may not.")
      .def(
          "unreachable",
          [](Exchange& e, const py::bytes& peer) { e.unreachable(std::string(peer)); },
          py::arg("peer"), "Note that there is no connection to a peer at present.")
      .def(
          "forget", [](Exchange& e, const py::bytes& peer) { e.forget(std::string(peer)); },
          py::arg("peer"))
      .def(
          "block",
          [](Exchange& e, const py::bytes& user, bool blocked) {
            e.block(std::string(user), blocked);
          },
          py::arg("user"), py::arg("blocked"),
          "Hear nothing more from a user's peers, or hear them again.")
      .def("stats",
           [](const Exchange& e) {
             const ExchangeStats s = e.stats();
             py::dict out;
             out["bytes_in"] = s.bytes_in;
             out["bytes_out"] = s.bytes_out;
             out["frames_in"] = s.frames_in;
             out["frames_out"] = s.frames_out;
             out["dropped"] = s.dropped;
             out["owners"] = s.owners;
             return out;
           })
      .def(
          "capsule",
          [](const Exchange& e) {
            return py::capsule(static_cast<const void*>(e.sink()), FC_SINK_CAPSULE);
          },
          "The sink for fedcore._pump; the exchange must outlive its use.");
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
      "set_device",
      [](const std::optional<py::capsule>& device) {
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
  m.def("reduce_files", &py_reduce_files, py::arg("inputs"), py::arg("weights"), py::arg("tensors"),
        py::arg("out"), py::arg("threads") = 1, py::arg("progress") = std::nullopt,
        "Average tensors of mapped files: tensors = [(dtype, nbytes, input offsets, output "
        "offset)]. Returns None, or "
        "(input, tensor, element) of the first non-finite value.");
  bind_resume(m);
  bind_exchange(m);
}
