// The class fedcore._core.Codec, and LZ4's functions, which come from the extension module of the
// package lz4 and so need no header and no library at build time.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "codec/codec.hpp"
#include "codec/stage.hpp"
#include "codec/update_encoder.hpp"
#include "python/bindings.hpp"

namespace fedcore {
namespace {

// Throws Error{kConfig} if the package is missing or keeps the functions to itself.
Lz4 find_lz4() {
  const std::string hint = "lossless packing needs the Python package lz4 (pip install lz4)";
  std::string path;
  try {
    path = py::str(py::module_::import("lz4.block._block").attr("__file__"));
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) {
      throw;
    }
    throw Error(Errc::kConfig, hint);
  }
  // Never closed: Python does not unload the module either.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  Lz4 lz4;
  if (library != nullptr) {
    lz4.compress = reinterpret_cast<decltype(lz4.compress)>(dlsym(library, "LZ4_compress_default"));
    lz4.decompress =
        reinterpret_cast<decltype(lz4.decompress)>(dlsym(library, "LZ4_decompress_safe"));
  }
  if (lz4.compress == nullptr || lz4.decompress == nullptr) {
    throw Error(Errc::kConfig, hint + ": the installed one does not export LZ4's functions");
  }
  return lz4;
}

using OptionalBuffer = std::optional<py::buffer>;

// Buffers of one chunk each, for the length of a call.
class ChunkBuffers {
 public:
  explicit ChunkBuffers(std::uint64_t nbytes) : nbytes_(nbytes) {}

  std::uint8_t* add(const py::buffer& buffer, bool writable = false) {
    held_.push_back(std::make_unique<Bytes>(buffer, writable));
    if (held_.back()->size() != nbytes_) {
      throw Error(Errc::kLayout, "a buffer has " + std::to_string(held_.back()->size()) +
                                     " bytes, its chunk " + std::to_string(nbytes_));
    }
    return held_.back()->data();
  }
  std::uint8_t* add(const OptionalBuffer& buffer) { return buffer ? add(*buffer) : nullptr; }

 private:
  std::uint64_t nbytes_;
  std::vector<std::unique_ptr<Bytes>> held_;
};

// The lock keeps threads apart that Python lets in at the same time.
struct PyCodec {
  std::shared_ptr<Layout> layout;
  Codec codec;
  std::mutex lock;
};

// Of each stage: its name, and its options by name.
using StageList = std::vector<std::pair<std::string, std::map<std::string, double>>>;

std::unique_ptr<PyCodec> make_codec(const std::shared_ptr<Layout>& layout,
                                    const std::string& encoding, bool lossless, double top_k,
                                    const StageList& stages) {
  CodecOptions options{parse_encoding(encoding), lossless, top_k, {}};
  for (const auto& [name, given] : stages) {
    options.stages.push_back(make_stage(name, {given.begin(), given.end()}));
  }
  return std::unique_ptr<PyCodec>(
      new PyCodec{layout, Codec(layout, options, lossless ? find_lz4() : Lz4{}), {}});
}

py::tuple encode(PyCodec& self, std::uint64_t index, const py::buffer& values,
                 const OptionalBuffer& base, const OptionalBuffer& residual) {
  ChunkBuffers buffers(self.layout->chunk_range(index).nbytes);
  const std::uint8_t* const from = buffers.add(values);
  const std::uint8_t* const minus = buffers.add(base);
  const std::uint8_t* const plus = buffers.add(residual);
  std::vector<std::uint8_t> body;
  std::uint8_t encoding = 0;
  {
    const py::gil_scoped_release release;
    const std::lock_guard hold(self.lock);
    encoding = self.codec.encode(index, from, minus, plus, body);
  }
  return py::make_tuple(encoding,
                        py::bytes(reinterpret_cast<const char*>(body.data()), body.size()));
}

void decode(PyCodec& self, std::uint64_t index, std::uint8_t encoding, const py::buffer& body,
            const py::buffer& out, const OptionalBuffer& base) {
  ChunkBuffers buffers(self.layout->chunk_range(index).nbytes);
  std::uint8_t* const to = buffers.add(out, true);
  const std::uint8_t* const plus = buffers.add(base);
  const Bytes bytes(body);
  const char* why = nullptr;
  {
    const py::gil_scoped_release release;
    const std::lock_guard hold(self.lock);
    why = self.codec.decode(index, encoding, bytes.data(), bytes.size(), plus, to);
  }
  if (why != nullptr) {
    throw Error(Errc::kProtocol, undecodable(index, why));
  }
}

void carry(PyCodec& self, std::uint64_t index, const py::buffer& values,
           const OptionalBuffer& residual, const py::buffer& decoded, const py::buffer& out) {
  ChunkBuffers buffers(self.layout->chunk_range(index).nbytes);
  const std::uint8_t* const from = buffers.add(values);
  const std::uint8_t* const plus = buffers.add(residual);
  const std::uint8_t* const minus = buffers.add(decoded);
  std::uint8_t* const to = buffers.add(out, true);
  const py::gil_scoped_release release;
  self.codec.carry(index, from, plus, minus, to);
}

py::tuple py_encode_update(const py::object& codec, const FileHandle& values,
                           std::uint64_t values_at, const FileHandle& base, std::uint64_t base_at,
                           const FileHandle& out, const FileHandle* residual,
                           const FileHandle* lost, unsigned threads) {
  const std::shared_ptr<Codec> own = codec_of(codec);
  if (own == nullptr) {
    throw Error(Errc::kConfig, "an update needs a codec");
  }
  const UpdateFiles files{{values.share(), values_at},
                          {base.share(), base_at},
                          {residual != nullptr ? residual->share() : nullptr, 0},
                          {lost != nullptr ? lost->share() : nullptr, 0},
                          out.share()};
  auto asked = std::chrono::steady_clock::now();
  const auto progress = [&asked] {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked < std::chrono::milliseconds(50)) {
      return;
    }
    asked = now;
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
  };
  EncodedUpdate update;
  {
    const py::gil_scoped_release release;
    update = encode_update(*own, files, threads, progress);
  }
  return py::make_tuple(
      update.offsets,
      py::bytes(reinterpret_cast<const char*>(update.encodings.data()), update.encodings.size()),
      update.checksums, update.lost_checksum, update.found, update.decoded);
}

}  // namespace

std::shared_ptr<Codec> codec_of(const py::object& codec) {
  if (codec.is_none()) {
    return nullptr;
  }
  PyCodec& from = codec.cast<PyCodec&>();
  const std::lock_guard hold(from.lock);
  return std::make_shared<Codec>(from.codec);
}

void bind_codec(py::module_& m) {
  py::class_<PyCodec>(m, "Codec",
                      "One chunk of a layout as the bytes that travel, and back; one thread at a "
                      "time.")
      .def(
          py::init(&make_codec), py::arg("layout"), py::arg("encoding"),
          py::arg("lossless") = false, py::arg("top_k") = 0.01, py::arg("stages") = StageList{},
          "encoding: raw, bf16, fp16, int8, nf4 or top-k; stages: (name, options) of each one that "
          "changes differences before they are encoded. ConfigError for any other encoding or "
          "stage, "
          "for a share top_k outside (0, 1], and for lossless without the package lz4.")
      .def("encode", &encode, py::arg("index"), py::arg("values"), py::arg("base") = std::nullopt,
           py::arg("residual") = std::nullopt,
           "Encode values - base + residual, the flat bytes of chunk `index`: (encoding, body). "
           "NonFiniteError names tensor and element.")
      .def("decode", &decode, py::arg("index"), py::arg("encoding"), py::arg("body"),
           py::arg("out"), py::arg("base") = std::nullopt,
           "Write base + the decoded difference to `out`; ProtocolError, with nothing written, if "
           "the body is not one of this chunk.")
      .def("carry", &carry, py::arg("index"), py::arg("values"), py::arg("residual"),
           py::arg("decoded"), py::arg("out"),
           "Write values + residual - decoded to `out`: what the encoding lost of a chunk.");
  m.def("encode_update", &py_encode_update, py::arg("codec"), py::arg("values"),
        py::arg("values_at"), py::arg("base"), py::arg("base_at"), py::arg("out"),
        py::arg("residual") = nullptr, py::arg("lost") = nullptr, py::arg("threads") = 1,
        "Encode every chunk of values - base + residual into `out`, back to back, and write to "
        "`lost` what the "
        "encoding lost: (offsets, encodings, checksums, checksum of `lost`, and of each stage "
        "what it found of the differences before it and of what is decoded). NonFiniteError names "
        "tensor and "
        "element; StorageError: a file is too short, or the disk full.");
}

}  // namespace fedcore
