#include "reduce/view.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "codec/element.hpp"
#include "kernels/kernels.hpp"
#include "reduce/reducer.hpp"

namespace fedcore {

void widen(Dtype dtype, const void* from, double* to, std::size_t count) {
  with_float(dtype, [&]<typename T>(T, double) {
    for (std::size_t i = 0; i < count; ++i) {
      to[i] = T::read(static_cast<const std::uint8_t*>(from), i);
    }
  });
}

void View::values(Dtype dtype, std::uint64_t offset, double* out, std::size_t count) const {
  const std::size_t width = item_size(dtype);
  while (count > 0) {
    const std::uint64_t chunk = offset / layout_->chunk_bytes();
    const auto found = chunks_.find(chunk);
    if (found == chunks_.end() || offset >= layout_->total_bytes()) {
      throw Error(Errc::kLayout, "the rule reads more of a source than it needs");
    }
    const std::uint64_t at = offset - chunk * layout_->chunk_bytes();
    const std::size_t n = std::min<std::uint64_t>(
        count, (std::min(layout_->chunk_bytes(), layout_->chunk_range(chunk).nbytes) - at) / width);
    widen(dtype, found->second + at, out, n);
    out += n;
    offset += n * width;
    count -= n;
  }
}

void View::differences(Dtype dtype, std::uint64_t offset, double* out, std::size_t count) const {
  if (base_ == nullptr) {
    throw Error(Errc::kConfig, "a source has no base");
  }
  values(dtype, offset, out, count);
  with_float(dtype, [&]<typename T>(T, double) {
    for (std::size_t i = 0; i < count; ++i) {
      out[i] -= T::read(base_ + offset, i);
    }
  });
}

std::optional<std::uint64_t> Reducer::reduce_views(const Layout& layout, Range range,
                                                   std::span<const View> views,
                                                   const std::uint8_t* base, std::uint8_t* out) {
  combiner_->see(layout, range, views);
  wide_.resize(kernels::kPiece);
  for (const Run& run : layout.runs(range)) {
    const std::uint64_t begin = run.offset - range.offset;
    const std::uint8_t* const under = base != nullptr ? base + begin : nullptr;
    if (!is_float(run.dtype)) {
      std::memcpy(out + begin, under, run.nbytes);
      continue;
    }
    const std::size_t width = item_size(run.dtype), count = run.nbytes / width;
    for (std::size_t first = 0; first < count; first += kernels::kPiece) {
      const std::size_t at = first * width, n = std::min(kernels::kPiece, count - first);
      const std::uint8_t* const from = under != nullptr ? under + at : nullptr;
      combiner_->combine_seen(run.dtype, run.offset + at, from, wide_.data(), n);
      const std::int64_t bad =
          kernels::find_non_finite(Dtype::kF64, wide_.data(), n * sizeof(double));
      if (bad >= 0) {
        return run.offset + at + static_cast<std::uint64_t>(bad) * width;
      }
      if (finish_ != nullptr) {
        finish_->apply(run.dtype, run.offset + at, wide_.data(), from, out + begin + at, n);
        continue;
      }
      with_float(run.dtype, [&]<typename T>(T, double limit) {
        for (std::size_t i = 0; i < n; ++i) {
          T::write(out + begin + at, i, wide_[i], limit);
        }
      });
    }
  }
  return std::nullopt;
}

}  // namespace fedcore
