// Layout: a tensor table in canonical order, its flat bytes, and its chunk grid.
//
// Owns names, dtypes, shapes and offsets of one tensor set. Invariants: tensors are sorted by item
// size (descending), then by name (bytewise), and lie back to back from offset 0, so each one is
// aligned to its item size; a chunk holds chunk_bytes() of the flat bytes (the last one the rest)
// and no element straddles two chunks. Immutable after construction, hence usable from any thread.
// Cost: O(tensors) memory; chunk lookups are O(log tensors).
//
// The core's words for a stretch of bytes:
//   range  flat bytes from an offset on, of any dtypes;
//   chunk  the range that is requested, sent, checked and reduced as one: a cell of the grid;
//   run    the part of a range that has one dtype;
//   piece  as much of a run as is decoded and averaged while it is in the cache;
//   body   a chunk as a frame or a file carries it: its flat bytes, or what encodes them.
// A block is a number of elements: those of one call of a kernel, or those that share a scale.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fedcore {

enum class Dtype : std::uint8_t {
  kF64,
  kF32,
  kF16,
  kBF16,
  kI64,
  kI32,
  kI16,
  kI8,
  kU64,
  kU32,
  kU16,
  kU8,
  kBool
};

// The safetensors name of a dtype, and back; parse_dtype throws Error{kLayout} for any other name.
std::string_view dtype_name(Dtype dtype) noexcept;
Dtype parse_dtype(std::string_view name);
std::size_t item_size(Dtype dtype) noexcept;
bool is_float(Dtype dtype) noexcept;

struct TensorSpec {
  std::string name;
  Dtype dtype;
  std::vector<std::int64_t> shape;
};

struct Tensor {
  std::string name;
  Dtype dtype;
  std::vector<std::int64_t> shape;
  std::uint64_t offset;
  std::uint64_t nbytes;
};

struct Range {
  std::uint64_t offset;
  std::uint64_t nbytes;
};

// A stretch of flat bytes of one dtype; neighbours of the same dtype are merged.
struct Run {
  Dtype dtype;
  std::uint64_t offset;
  std::uint64_t nbytes;
};

struct Location {
  std::string_view tensor;
  std::uint64_t element;
};

class Layout {
 public:
  static constexpr std::uint64_t kPage = 4096;

  // Throws Error{kLayout} for an empty, duplicate or over-long name, a negative or overflowing
  // shape, and for a chunk size that is not a positive multiple of kPage.
  Layout(std::vector<TensorSpec> specs, std::uint64_t chunk_bytes);

  const std::vector<Tensor>& tensors() const noexcept { return tensors_; }
  std::uint64_t total_bytes() const noexcept { return total_bytes_; }
  std::uint64_t chunk_bytes() const noexcept { return chunk_bytes_; }
  std::uint64_t chunk_count() const noexcept { return chunk_count_; }

  // Throws Error{kLayout} for an index past the end.
  Range chunk_range(std::uint64_t index) const;

  // The runs that cover [range.offset, range.offset + range.nbytes), clipped to it, in order.
  std::vector<Run> runs(Range range) const;

  // Which tensor and element hold a flat byte; throws Error{kLayout} past the end.
  Location locate(std::uint64_t byte_offset) const;

 private:
  std::vector<Tensor> tensors_;
  std::vector<Run> runs_;
  std::uint64_t total_bytes_ = 0;
  std::uint64_t chunk_bytes_;
  std::uint64_t chunk_count_ = 0;
};

}  // namespace fedcore
