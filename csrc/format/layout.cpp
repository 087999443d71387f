#include "format/layout.hpp"

#include <algorithm>
#include <array>
#include <unordered_set>

#include "base/error.hpp"

namespace fedcore {
namespace {

struct DtypeInfo {
  std::string_view name;
  std::size_t size;
};

constexpr std::array<DtypeInfo, 13> kDtypes{{{"F64", 8},
                                             {"F32", 4},
                                             {"F16", 2},
                                             {"BF16", 2},
                                             {"I64", 8},
                                             {"I32", 4},
                                             {"I16", 2},
                                             {"I8", 1},
                                             {"U64", 8},
                                             {"U32", 4},
                                             {"U16", 2},
                                             {"U8", 1},
                                             {"BOOL", 1}}};
constexpr std::size_t kMaxName = 1024;
constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 62;

std::uint64_t checked_bytes(const TensorSpec& spec) {
  std::uint64_t bytes = item_size(spec.dtype);
  bool empty = false;
  for (const std::int64_t dim : spec.shape) {
    if (dim < 0) {
      throw Error(Errc::kLayout,
                  "tensor '" + spec.name + "': negative dimension " + std::to_string(dim));
    }
    empty = empty || dim == 0;
  }
  if (empty) {
    return 0;
  }
  for (const std::int64_t dim : spec.shape) {
    if (bytes > kMaxBytes / static_cast<std::uint64_t>(dim)) {
      throw Error(Errc::kLayout,
                  "tensor '" + spec.name + "': its shape overflows 62 bits of bytes");
    }
    bytes *= static_cast<std::uint64_t>(dim);
  }
  return bytes;
}

void check_names(const std::vector<TensorSpec>& specs) {
  std::unordered_set<std::string_view> seen;
  for (const TensorSpec& spec : specs) {
    if (spec.name.empty()) {
      throw Error(Errc::kLayout, "a tensor has an empty name");
    }
    if (spec.name.size() > kMaxName) {
      throw Error(Errc::kLayout, "the tensor name '" + spec.name.substr(0, 60) +
                                     "...' is longer than " + std::to_string(kMaxName) + " bytes");
    }
    if (!seen.insert(spec.name).second) {
      throw Error(Errc::kLayout, "tensor '" + spec.name + "' is there twice");
    }
  }
}

}  // namespace

std::string_view dtype_name(Dtype dtype) noexcept {
  return kDtypes[static_cast<std::size_t>(dtype)].name;
}

std::size_t item_size(Dtype dtype) noexcept {
  return kDtypes[static_cast<std::size_t>(dtype)].size;
}

bool is_float(Dtype dtype) noexcept { return dtype <= Dtype::kBF16; }

Dtype parse_dtype(std::string_view name) {
  for (std::size_t i = 0; i < kDtypes.size(); ++i) {
    if (kDtypes[i].name == name) {
      return static_cast<Dtype>(i);
    }
  }
  std::string known;
  for (const DtypeInfo& info : kDtypes) {
    known += (known.empty() ? "" : ", ") + std::string(info.name);
  }
  throw Error(Errc::kLayout,
              "dtype '" + std::string(name) + "' can't be averaged; expected one of " + known);
}

Layout::Layout(std::vector<TensorSpec> specs, std::uint64_t chunk_bytes)
    : chunk_bytes_(chunk_bytes) {
  if (chunk_bytes == 0 || chunk_bytes % kPage != 0) {
    throw Error(Errc::kLayout, "chunk size " + std::to_string(chunk_bytes) +
                                   ": expected a positive multiple of " + std::to_string(kPage));
  }
  check_names(specs);
  std::sort(specs.begin(), specs.end(), [](const TensorSpec& a, const TensorSpec& b) {
    const std::size_t size_a = item_size(a.dtype), size_b = item_size(b.dtype);
    return size_a != size_b ? size_a > size_b : a.name < b.name;
  });
  tensors_.reserve(specs.size());
  for (TensorSpec& spec : specs) {
    const std::uint64_t nbytes = checked_bytes(spec);
    if (nbytes > kMaxBytes - total_bytes_) {
      throw Error(Errc::kLayout, "the tensors overflow 62 bits of bytes");
    }
    if (nbytes > 0) {
      if (!runs_.empty() && runs_.back().dtype == spec.dtype) {
        runs_.back().nbytes += nbytes;
      } else {
        runs_.push_back({spec.dtype, total_bytes_, nbytes});
      }
    }
    tensors_.push_back(
        {std::move(spec.name), spec.dtype, std::move(spec.shape), total_bytes_, nbytes});
    total_bytes_ += nbytes;
  }
  chunk_count_ = (total_bytes_ + chunk_bytes_ - 1) / chunk_bytes_;
}

Range Layout::chunk_range(std::uint64_t index) const {
  if (index >= chunk_count_) {
    throw Error(Errc::kLayout,
                "chunk " + std::to_string(index) + " of " + std::to_string(chunk_count_));
  }
  const std::uint64_t offset = index * chunk_bytes_;
  return {offset, std::min(chunk_bytes_, total_bytes_ - offset)};
}

std::vector<Run> Layout::runs(Range range) const {
  std::vector<Run> found;
  const std::uint64_t end = range.offset + range.nbytes;
  auto run = std::upper_bound(
      runs_.begin(), runs_.end(), range.offset,
      [](std::uint64_t offset, const Run& r) { return offset < r.offset + r.nbytes; });
  for (; run != runs_.end() && run->offset < end; ++run) {
    const std::uint64_t from = std::max(range.offset, run->offset);
    const std::uint64_t to = std::min(end, run->offset + run->nbytes);
    found.push_back({run->dtype, from, to - from});
  }
  return found;
}

Location Layout::locate(std::uint64_t byte_offset) const {
  if (byte_offset >= total_bytes_) {
    throw Error(Errc::kLayout,
                "byte " + std::to_string(byte_offset) + " of " + std::to_string(total_bytes_));
  }
  auto next = std::upper_bound(
      tensors_.begin(), tensors_.end(), byte_offset,
      [](std::uint64_t offset, const Tensor& t) { return offset < t.offset + t.nbytes; });
  return {next->name, (byte_offset - next->offset) / item_size(next->dtype)};
}

}  // namespace fedcore
