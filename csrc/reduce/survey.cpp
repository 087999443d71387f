#include "reduce/survey.hpp"

#include <algorithm>
#include <utility>

#include "codec/element.hpp"
#include "kernels/arith.hpp"
#include "kernels/decode.hpp"
#include "reduce/pair_loops.hpp"

namespace fedcore {
namespace {

constexpr std::size_t kLanes = PairLoops::kLanes;
constexpr std::size_t kStep = 256;  // elements of a body in a piece
constexpr std::size_t kStride = kStep + 2 * kLanes;

static_assert(kStep % quantise::kInt8Block == 0 && kStep <= RunReader::kTile);

}  // namespace

ChunkSurvey::ChunkSurvey(std::size_t rows, std::vector<Range> skipped)
    : rows_(rows),
      skipped_(std::move(skipped)),
      at_(rows),
      piece_(kStep * sizeof(double)),
      values_(rows * kStride),
      lanes_(pairs_of(rows) * kLanes) {}

std::size_t ChunkSurvey::scratch(std::size_t k, std::uint64_t chunk_bytes) noexcept {
  const std::size_t blocks = static_cast<std::size_t>((chunk_bytes + kBlock - 1) / kBlock);
  return sizeof(double) * (k * kStride + pairs_of(k) * (kLanes + 2 * blocks));
}

std::optional<BadValue> ChunkSurvey::measure(const Layout& layout, Range range, const Body* bodies,
                                             const std::uint8_t* base) {
  squares_.clear();
  begun_ = false;
  for (std::size_t k = 0; k < rows_; ++k) {
    at_[k] = bodies[k].data;
  }
  for (const Run& run : layout.runs(range)) {
    if (is_float(run.dtype)) {
      const auto bad = measure_run(run, bodies, at_offset(base, run.offset - range.offset));
      if (bad) {
        return bad;
      }
    }
    for (std::size_t k = 0; k < rows_; ++k) {
      at_[k] += run_bytes(bodies[k].encoding, run, at_[k]);
    }
  }
  end_block();
  return std::nullopt;
}

std::optional<BadValue> ChunkSurvey::measure_run(const Run& run, const Body* bodies,
                                                 const std::uint8_t* base) {
  const std::size_t width = item_size(run.dtype), count = count_of(run);
  const auto widen = pair_loops().widen[float_place(run.dtype)];
  readers_.clear();
  for (std::size_t k = 0; k < rows_; ++k) {
    if (encodes(bodies[k].encoding, run.dtype)) {
      readers_.emplace_back(bodies[k].encoding, run.dtype, at_[k], count);
    }
  }
  for (std::size_t first = 0; first < count; first += kStep) {
    const std::size_t n = std::min(kStep, count - first), at = first * width;
    const std::uint64_t offset = run.offset + at;
    const std::size_t phase = offset / width % kLanes;
    std::size_t reader = 0;
    for (std::size_t k = 0; k < rows_; ++k) {
      const std::uint8_t* from = at_[k] + at;
      if (encodes(bodies[k].encoding, run.dtype)) {
        readers_[reader++].next(at_offset(base, at), piece_.data(), n);
        from = piece_.data();
      }
      double* const row = values_.data() + k * kStride;
      std::fill(row, row + phase, 0.0);
      std::fill(row + phase + n, row + kStride, 0.0);
      if (widen(from, row + phase, n) != 0) {
        const double* const bad = std::find_if(row + phase, row + phase + n,
                                               [](double v) { return arith::non_finite(v) != 0; });
        return BadValue{k, offset + static_cast<std::uint64_t>(bad - row - phase) * width};
      }
    }
    skip(run, offset, n, phase);
    add(run, offset, n);
  }
  return std::nullopt;
}

// Elements that do not count are 0 in all rows.
void ChunkSurvey::skip(const Run& run, std::uint64_t offset, std::size_t count, std::size_t phase) {
  const std::size_t width = item_size(run.dtype);
  for (const Range& range : skipped_) {
    const auto element = [&](std::uint64_t at) {
      return std::min<std::uint64_t>(count, (std::max(at, offset) - offset) / width);
    };
    const std::size_t begin = element(range.offset), end = element(range.offset + range.nbytes);
    for (std::size_t k = 0; k < rows_ && begin < end; ++k) {
      double* const row = values_.data() + k * kStride + phase;
      std::fill(row + begin, row + end, 0.0);
    }
  }
}

// Adds what values_ holds to the sums of its block, or of its blocks. A block begins at a multiple of
// kLanes elements of any dtype.
void ChunkSurvey::add(const Run& run, std::uint64_t offset, std::size_t count) {
  const std::size_t width = item_size(run.dtype);
  const std::size_t phase = offset / width % kLanes;
  const std::size_t end = phase + count;
  std::size_t done = 0;
  std::uint64_t at = offset - phase * width;  // of column `done`
  while (done < end) {
    const std::uint64_t block = at / kBlock;
    if (begun_ && block != block_) {
      end_block();
    }
    if (!begun_) {
      std::fill(lanes_.begin(), lanes_.end(), 0.0);
      block_ = block;
      begun_ = true;
    }
    const std::size_t here =
        std::min<std::uint64_t>(end - done, ((block + 1) * kBlock - at) / width);
    const std::size_t padded = (here + kLanes - 1) / kLanes * kLanes;
    pair_loops().add_pairs(values_.data() + done, rows_, kStride, padded, lanes_.data());
    done += here;
    at += here * width;
  }
}

void ChunkSurvey::end_block() {
  for (std::size_t p = 0; begun_ && p < pairs_of(rows_); ++p) {
    squares_.push_back(sum_of_lanes(lanes_.data() + p * kLanes));
  }
  begun_ = false;
}

}  // namespace fedcore
