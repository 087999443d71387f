#include "reduce/reducer.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.hpp"
#include "codec/element.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {

Reducer::Reducer(const std::vector<std::uint64_t>& weights)
    : bodies_(weights.size()), pointers_(weights.size()), encodings_(weights.size()) {
  if (weights.empty()) {
    throw Error(Errc::kWeight, "a mean needs at least one input");
  }
  for (const std::uint64_t weight : weights) {
    if (!kernels::is_weight(weight)) {
      throw Error(Errc::kWeight,
                  "weight " + std::to_string(weight) + ": expected " + kernels::kWeightRule);
    }
    weights_.push_back(static_cast<double>(weight));
    total_ += static_cast<double>(weight);
  }
}

std::optional<BadValue> Reducer::reduce(const Layout& layout, Range range, const Body* inputs,
                                        const std::uint8_t* base, std::uint8_t* out) {
  for (std::size_t k = 0; k < weights_.size(); ++k) {
    bodies_[k] = inputs[k].data;
  }
  for (const Run& run : layout.runs(range)) {
    const std::uint64_t at = run.offset - range.offset;
    const std::uint8_t* const run_base = base != nullptr ? base + at : nullptr;
    bool encoded = false;
    for (std::size_t k = 0; k < weights_.size(); ++k) {
      const bool here = encodes(inputs[k].scheme, run.dtype);
      pointers_[k] = bodies_[k];
      encodings_[k] = static_cast<std::uint8_t>(here ? inputs[k].scheme : Scheme::kRaw);
      encoded = encoded || here;
    }
    std::optional<BadValue> bad;
    if (encoded) {
      const int verdict = kernels::mean_on_device(
          {static_cast<int>(run.dtype), weights_.size(), pointers_.data(), encodings_.data(),
           weights_.data(), total_, run_base, out + at, run.nbytes / item_size(run.dtype)});
      if (verdict != FC_MEAN_FINITE) {  // the CPU finds what is not finite
        bad = reduce_pieces(run, inputs, run_base, out + at);
      }
    } else if (!kernels::mean(run.dtype, pointers_.data(), weights_.data(), weights_.size(), total_,
                              run_base, out + at, run.nbytes)) {
      bad = find_bad(run.dtype, run.offset, run.nbytes);
    }
    if (bad) {
      return bad;
    }
    for (std::size_t k = 0; k < weights_.size(); ++k) {
      bodies_[k] += run_bytes(inputs[k].scheme, run, bodies_[k]);
    }
  }
  return std::nullopt;
}

// A run that is encoded in one input at least: a piece of each is decoded, and their mean taken,
// while they are in the cache.
std::optional<BadValue> Reducer::reduce_pieces(const Run& run, const Body* inputs,
                                               const std::uint8_t* base, std::uint8_t* out) {
  const std::size_t width = item_size(run.dtype), count = run.nbytes / width;
  const std::size_t piece_bytes = kernels::kPiece * width;
  readers_.clear();
  for (std::size_t k = 0; k < weights_.size(); ++k) {
    if (encodes(inputs[k].scheme, run.dtype)) {
      readers_.emplace_back(inputs[k].scheme, run.dtype, bodies_[k], count);
    }
  }
  pieces_.resize(std::max(pieces_.size(), readers_.size() * piece_bytes));
  for (std::size_t first = 0; first < count; first += kernels::kPiece) {
    const std::size_t at = first * width, n = std::min(kernels::kPiece, count - first);
    std::size_t reader = 0;
    for (std::size_t k = 0; k < weights_.size(); ++k) {
      pointers_[k] = bodies_[k] + at;
      if (encodes(inputs[k].scheme, run.dtype)) {
        std::uint8_t* const piece = pieces_.data() + reader * piece_bytes;
        readers_[reader++].next(base != nullptr ? base + at : nullptr, piece, n);
        pointers_[k] = piece;
      }
    }
    if (!kernels::mean_here(run.dtype, pointers_.data(), weights_.data(), weights_.size(), total_,
                            nullptr, out + at, n * width)) {
      return find_bad(run.dtype, run.offset + at, n * width);
    }
  }
  return std::nullopt;
}

// The first value that is not finite in the block that pointers_ show.
std::optional<BadValue> Reducer::find_bad(Dtype dtype, std::uint64_t offset,
                                          std::uint64_t nbytes) const {
  for (std::size_t k = 0; k < weights_.size(); ++k) {
    const std::int64_t found = kernels::find_non_finite(dtype, pointers_[k], nbytes);
    if (found >= 0) {
      return BadValue{k, offset + static_cast<std::uint64_t>(found) * item_size(dtype)};
    }
  }
  return std::nullopt;
}

std::optional<BadValue> Reducer::fold(const Layout& layout, Range range, std::size_t source,
                                      const Body& input, const std::uint8_t* base,
                                      std::uint8_t* out) {
  const std::vector<Run> runs = layout.runs(range);
  std::size_t sums = 0;
  const std::uint8_t* body = input.data;
  for (const Run& run : runs) {
    if (!encodes(input.scheme, run.dtype)) {  // what is encoded is finite
      const std::int64_t found = kernels::find_non_finite(run.dtype, body, run.nbytes);
      if (found >= 0) {
        return BadValue{source,
                        run.offset + static_cast<std::uint64_t>(found) * item_size(run.dtype)};
      }
    }
    body += run_bytes(input.scheme, run, body);
    sums += kernels::sums_per_element(run.dtype) * run.nbytes / item_size(run.dtype);
  }
  sums_.resize(std::max(sums, sums_.size()));
  double* at = sums_.data();
  body = input.data;
  for (const Run& run : runs) {
    const std::uint64_t begin = run.offset - range.offset;
    if (encodes(input.scheme, run.dtype)) {
      fold_pieces(run, source, input.scheme, body, base != nullptr ? base + begin : nullptr, at);
    } else if (is_float(run.dtype)) {
      kernels::fold(run.dtype, body, weights_[source], source == 0, at, run.nbytes);
    } else if (source == 0) {
      std::memcpy(out + begin, base != nullptr ? base + begin : body, run.nbytes);
    }
    at += kernels::sums_per_element(run.dtype) * run.nbytes / item_size(run.dtype);
    body += run_bytes(input.scheme, run, body);
  }
  return std::nullopt;
}

void Reducer::fold_pieces(const Run& run, std::size_t source, Scheme scheme,
                          const std::uint8_t* body, const std::uint8_t* base, double* sums) {
  const std::size_t width = item_size(run.dtype), count = run.nbytes / width;
  RunReader reader(scheme, run.dtype, body, count);
  pieces_.resize(std::max(pieces_.size(), kernels::kPiece * width));
  for (std::size_t first = 0; first < count; first += kernels::kPiece) {
    const std::size_t n = std::min(kernels::kPiece, count - first);
    reader.next(base != nullptr ? base + first * width : nullptr, pieces_.data(), n);
    kernels::fold(run.dtype, pieces_.data(), weights_[source], source == 0,
                  sums + kernels::sums_per_element(run.dtype) * first, n * width);
  }
}

void Reducer::finish(const Layout& layout, Range range, std::uint8_t* out) {
  const double* at = sums_.data();
  for (const Run& run : layout.runs(range)) {
    kernels::finish(run.dtype, at, total_, out + (run.offset - range.offset), run.nbytes);
    at += kernels::sums_per_element(run.dtype) * run.nbytes / item_size(run.dtype);
  }
}

}  // namespace fedcore
