#include "reduce/reducer.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "codec/element.hpp"
#include "kernels/kernels.hpp"
#include "reduce/families.hpp"

namespace fedcore {

Reducer::Reducer(const Rule& rule, const std::vector<double>& weights, Finish* finish,
                 std::vector<Range> plain, std::size_t plain_inputs)
    : rule_(rule),
      finish_(finish),
      plain_(std::move(plain)),
      bodies_(weights.size()),
      pointers_(weights.size()),
      shifted_(weights.size()),
      encodings_(weights.size()) {
  check_weights(rule, weights);
  combiner_ = rule.make(weights);
  if (!plain_.empty()) {
    std::vector<double> own = rule.weigh ? rule.weigh(weights) : weights;
    own.resize(plain_inputs == 0 ? own.size() : plain_inputs);
    mean_ = kMean.make(own);
  }
}

std::optional<BadValue> Reducer::reduce(const Layout& layout, Range range, const Body* inputs,
                                        const std::uint8_t* base, std::uint8_t* out) {
  try {
    return reduce_runs(layout, range, inputs, base, out);
  } catch (const RuleError& error) {
    const Location where = layout.locate(block_ + error.element() * width_);
    throw RuleError("tensor '" + std::string(where.tensor) + "', element " +
                        std::to_string(where.element) + ": " + error.what(),
                    static_cast<std::size_t>(where.element), error.trace());
  }
}

std::optional<BadValue> Reducer::reduce_runs(const Layout& layout, Range range, const Body* inputs,
                                             const std::uint8_t* base, std::uint8_t* out) {
  for (std::size_t k = 0; k < bodies_.size(); ++k) {
    bodies_[k] = inputs[k].data;
  }
  for (const Run& run : layout.runs(range)) {
    const std::uint64_t at = run.offset - range.offset;
    if (const auto bad = reduce_run(run, inputs, base != nullptr ? base + at : nullptr, out + at)) {
      return bad;
    }
    for (std::size_t k = 0; k < bodies_.size(); ++k) {
      bodies_[k] += run_bytes(inputs[k].encoding, run, bodies_[k]);
    }
  }
  return std::nullopt;
}

std::optional<BadValue> Reducer::reduce_run(const Run& run, const Body* inputs,
                                            const std::uint8_t* base, std::uint8_t* out) {
  bool encoded = false;
  for (std::size_t k = 0; k < bodies_.size(); ++k) {
    const bool here = encodes(inputs[k].encoding, run.dtype);
    pointers_[k] = bodies_[k];
    encodings_[k] = static_cast<std::uint8_t>(here ? inputs[k].encoding : Encoding::kRaw);
    encoded = encoded || here;
  }
  block_ = run.offset;
  width_ = item_size(run.dtype);
  int verdict = FC_MEAN_DECLINED;
  if (is_float(run.dtype) && !finishes(run.dtype) && !has_plain(run)) {
    verdict = combiner_->combine_on_device(
        run.dtype, pointers_.data(), encoded ? encodings_.data() : nullptr,
        encoded ? base : nullptr, out, run.nbytes / item_size(run.dtype));
  }
  if (verdict == FC_MEAN_FINITE) {
    return std::nullopt;
  }
  if (encoded || finishes(run.dtype)) {
    return reduce_pieces(run, inputs, base, out);
  }
  if (verdict == FC_MEAN_NON_FINITE ||  // the CPU finds what is not finite
      !combine(run.dtype, run.offset, base, out, nullptr, run.nbytes / width_)) {
    return find_bad(run.dtype, run.offset, run.nbytes);
  }
  return std::nullopt;
}

// A run that is encoded in one input at least, or that a finisher follows: a piece of each is
// decoded, and they are combined, while they are in the cache.
std::optional<BadValue> Reducer::reduce_pieces(const Run& run, const Body* inputs,
                                               const std::uint8_t* base, std::uint8_t* out) {
  const std::size_t width = item_size(run.dtype), count = run.nbytes / width;
  const std::size_t piece_bytes = kernels::kPiece * width;
  readers_.clear();
  for (std::size_t k = 0; k < bodies_.size(); ++k) {
    if (encodes(inputs[k].encoding, run.dtype)) {
      readers_.emplace_back(inputs[k].encoding, run.dtype, bodies_[k], count);
    }
  }
  pieces_.resize(std::max(pieces_.size(), readers_.size() * piece_bytes));
  for (std::size_t first = 0; first < count; first += kernels::kPiece) {
    const std::size_t at = first * width, n = std::min(kernels::kPiece, count - first);
    std::size_t reader = 0;
    for (std::size_t k = 0; k < bodies_.size(); ++k) {
      pointers_[k] = bodies_[k] + at;
      if (encodes(inputs[k].encoding, run.dtype)) {
        std::uint8_t* const piece = pieces_.data() + reader * piece_bytes;
        readers_[reader++].next(base != nullptr ? base + at : nullptr, piece, n);
        pointers_[k] = piece;
      }
    }
    if (!combine_piece(run, first, n, base, out)) {
      return find_bad(run.dtype, run.offset + at, n * width);
    }
  }
  return std::nullopt;
}

bool Reducer::has_plain(const Run& run) const noexcept {
  return std::any_of(plain_.begin(), plain_.end(), [&](const Range& range) {
    return range.offset < run.offset + run.nbytes && run.offset < range.offset + range.nbytes;
  });
}

// Combines `count` elements from flat byte `offset` on, which pointers_ show: by the rule, or by the
// mean where they are plain. Into `out`, or in binary64 into `wide`.
bool Reducer::combine(Dtype dtype, std::uint64_t offset, const std::uint8_t* base,
                      std::uint8_t* out, double* wide, std::size_t count) {
  if (!is_float(dtype) || plain_.empty()) {
    return combine_stretch(*combiner_, dtype, 0, count, base, out, wide);
  }
  const std::size_t width = item_size(dtype);
  const auto element = [&](std::uint64_t at) {
    return std::min<std::uint64_t>(count, (std::max(at, offset) - offset) / width);
  };
  std::size_t done = 0;
  for (const Range& range : plain_) {
    const std::size_t begin = element(range.offset), end = element(range.offset + range.nbytes);
    if (begin == end) {
      continue;
    }
    if (!combine_stretch(*combiner_, dtype, done, begin - done, base, out, wide) ||
        !combine_stretch(*mean_, dtype, begin, end - begin, base, out, wide)) {
      return false;
    }
    done = end;
  }
  return combine_stretch(*combiner_, dtype, done, count - done, base, out, wide);
}

bool Reducer::combine_stretch(Combiner& combiner, Dtype dtype, std::size_t first, std::size_t count,
                              const std::uint8_t* base, std::uint8_t* out, double* wide) {
  if (count == 0) {
    return true;
  }
  const std::size_t width = item_size(dtype), at = first * width;
  for (std::size_t k = 0; k < pointers_.size(); ++k) {
    shifted_[k] = static_cast<const std::uint8_t*>(pointers_[k]) + at;
  }
  try {
    return wide != nullptr
               ? combiner.combine_wide(dtype, shifted_.data(), wide + first, count)
               : combiner.combine(dtype, shifted_.data(), base != nullptr ? base + at : nullptr,
                                  out + at, count * width);
  } catch (const RuleError& error) {
    throw RuleError(error.what(), first + error.element(), error.trace());
  }
}

// Combines the piece that pointers_ show; `base` and `out` point at the run's first byte.
bool Reducer::combine_piece(const Run& run, std::size_t first, std::size_t n,
                            const std::uint8_t* base, std::uint8_t* out) {
  const std::size_t width = item_size(run.dtype), at = first * width;
  block_ = run.offset + at;
  if (!finishes(run.dtype)) {
    return combine(run.dtype, block_, nullptr, out + at, nullptr, n);
  }
  wide_.resize(kernels::kPiece);
  if (!combine(run.dtype, block_, nullptr, nullptr, wide_.data(), n)) {
    return false;
  }
  finish_->apply(run.dtype, run.offset + at, wide_.data(), base != nullptr ? base + at : nullptr,
                 out + at, n);
  return true;
}

// The first value that is not finite in the block that pointers_ show.
std::optional<BadValue> Reducer::find_bad(Dtype dtype, std::uint64_t offset,
                                          std::uint64_t nbytes) const {
  for (std::size_t k = 0; k < pointers_.size(); ++k) {
    const std::int64_t found = kernels::find_non_finite(dtype, pointers_[k], nbytes);
    if (found >= 0) {
      return BadValue{k, offset + static_cast<std::uint64_t>(found) * item_size(dtype)};
    }
  }
  return std::nullopt;
}

// The sums of a run; none for integers and booleans.
std::size_t Reducer::sums_of(const Run& run) const noexcept {
  return rule_.sums_per_element(run.dtype) * run.nbytes / item_size(run.dtype);
}

std::optional<BadValue> Reducer::fold(const Layout& layout, Range range, std::size_t source,
                                      const Body& input, const std::uint8_t* base,
                                      std::uint8_t* out) {
  const std::vector<Run> runs = layout.runs(range);
  std::size_t sums = 0;
  const std::uint8_t* body = input.data;
  for (const Run& run : runs) {
    if (!encodes(input.encoding, run.dtype)) {  // what is encoded is finite
      const std::int64_t found = kernels::find_non_finite(run.dtype, body, run.nbytes);
      if (found >= 0) {
        return BadValue{source,
                        run.offset + static_cast<std::uint64_t>(found) * item_size(run.dtype)};
      }
    }
    body += run_bytes(input.encoding, run, body);
    sums += sums_of(run);
  }
  sums_.resize(std::max(sums, sums_.size()));
  double* at = sums_.data();
  body = input.data;
  for (const Run& run : runs) {
    const std::uint64_t begin = run.offset - range.offset;
    if (encodes(input.encoding, run.dtype)) {
      fold_pieces(run, source, input.encoding, body, base != nullptr ? base + begin : nullptr, at);
    } else if (is_float(run.dtype)) {
      combiner_->fold(run.dtype, source, body, at, run.nbytes);
    } else if (source == 0) {
      std::memcpy(out + begin, base != nullptr ? base + begin : body, run.nbytes);
    }
    at += sums_of(run);
    body += run_bytes(input.encoding, run, body);
  }
  return std::nullopt;
}

void Reducer::fold_pieces(const Run& run, std::size_t source, Encoding encoding,
                          const std::uint8_t* body, const std::uint8_t* base, double* sums) {
  const std::size_t width = item_size(run.dtype), count = run.nbytes / width;
  RunReader reader(encoding, run.dtype, body, count);
  pieces_.resize(std::max(pieces_.size(), kernels::kPiece * width));
  for (std::size_t first = 0; first < count; first += kernels::kPiece) {
    const std::size_t n = std::min(kernels::kPiece, count - first);
    reader.next(base != nullptr ? base + first * width : nullptr, pieces_.data(), n);
    combiner_->fold(run.dtype, source, pieces_.data(),
                    sums + rule_.sums_per_element(run.dtype) * first, n * width);
  }
}

void Reducer::finish(const Layout& layout, Range range, const std::uint8_t* base,
                     std::uint8_t* out) {
  const double* sums = sums_.data();
  for (const Run& run : layout.runs(range)) {
    const std::uint64_t begin = run.offset - range.offset;
    if (!is_float(run.dtype)) {
      continue;  // fold() has copied it
    }
    if (finish_ == nullptr) {
      combiner_->finish_fold(run.dtype, sums, out + begin, run.nbytes);
    } else {
      finish_pieces(run, sums, base != nullptr ? base + begin : nullptr, out + begin);
    }
    sums += sums_of(run);
  }
}

void Reducer::finish_pieces(const Run& run, const double* sums, const std::uint8_t* base,
                            std::uint8_t* out) {
  const std::size_t width = item_size(run.dtype), count = run.nbytes / width;
  wide_.resize(kernels::kPiece);
  for (std::size_t first = 0; first < count; first += kernels::kPiece) {
    const std::size_t at = first * width, n = std::min(kernels::kPiece, count - first);
    combiner_->finish_fold_wide(run.dtype, sums + rule_.sums_per_element(run.dtype) * first,
                                wide_.data(), n);
    finish_->apply(run.dtype, run.offset + at, wide_.data(), base != nullptr ? base + at : nullptr,
                   out + at, n);
  }
}

}  // namespace fedcore
