// The coordinate-wise median (Yin et al. 2018, "Byzantine-Robust Distributed Learning").
//
// Values are ordered as integers of their bits, so -0 < +0. For an odd K the result has the bits of
// the middle value. For an even K the two middle values are added in binary64, halved, and rounded
// once; where the sum of two F64 values leaves the range, their halves are added, which is the same
// number. Weights do not count.
//
// A piece of each source is turned into sortable integers and sorted across the sources by a
// network (Batcher's odd-even merge, Knuth 5.2.2M) that is cut down to what the middle needs. Each
// of its comparators is one kernels::exchange() over the piece. Cost: about K log2(K)^2 / 4
// comparators.
#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/arith.hpp"
#include "kernels/kernels.hpp"
#include "reduce/families.hpp"

namespace fedcore {
namespace {

using Comparator = std::pair<std::uint32_t, std::uint32_t>;

// Elements of a source in a piece, so that the pieces of all sources stay in the cache.
std::size_t piece_elements(std::size_t k) {
  constexpr std::size_t kCached = 128u << 10, kLeast = 64, kMost = 1024;
  return std::clamp(kCached / (k * sizeof(std::int64_t)) / kLeast * kLeast, kLeast, kMost);
}

template <typename Each>
void for_comparators(std::size_t k, Each&& each) {
  for (std::size_t p = 1; p < k; p *= 2) {
    for (std::size_t step = p; step >= 1; step /= 2) {
      for (std::size_t j = step % p; j + step < k; j += 2 * step) {
        for (std::size_t i = j; i < std::min(j + step, k - step); ++i) {
          if (i / (2 * p) == (i + step) / (2 * p)) {
            each(i, i + step);
          }
        }
      }
    }
  }
}

// The comparators, first to last, that the middle one or two outputs depend on.
std::vector<Comparator> middle_network(std::size_t k) {
  std::vector<Comparator> all, kept;
  for_comparators(k, [&](std::size_t low, std::size_t high) {
    all.emplace_back(static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(high));
  });
  std::vector<bool> needed(k, false);
  needed[(k - 1) / 2] = needed[k / 2] = true;
  for (auto at = all.rbegin(); at != all.rend(); ++at) {
    if (needed[at->first] || needed[at->second]) {
      needed[at->first] = needed[at->second] = true;
      kept.push_back(*at);
    }
  }
  std::reverse(kept.begin(), kept.end());
  return kept;
}

// A word's bits as an integer of the same order as the numbers, and back: the sign bit stays, and
// inverts the others. Shifting a negative integer repeats its sign.
template <typename Key>
Key turned(Key bits) {
  using Word = std::make_unsigned_t<Key>;
  const auto sign = static_cast<Word>(bits >> (8 * sizeof(Key) - 1));
  return static_cast<Key>(static_cast<Word>(bits) ^ static_cast<Word>(sign >> 1));
}

// Reads n values as keys. Returns false if one is NaN or infinite.
template <typename Key>
bool read_keys(const std::uint8_t* from, Key exponent, Key* to, std::size_t n) {
  Key bad = 0;
  for (std::size_t i = 0; i < n; ++i) {
    Key bits;
    std::memcpy(&bits, from + i * sizeof(Key), sizeof bits);
    bad = static_cast<Key>(bad | ((bits & exponent) == exponent ? 1 : 0));
    to[i] = turned(bits);
  }
  return bad == 0;
}

// Half the sum of two finite numbers; the halves are added where the sum leaves binary64's range.
double halfway(double low, double high) {
  const double sum = low + high;
  return arith::non_finite(sum) != 0 ? low * 0.5 + high * 0.5 : sum * 0.5;
}

class Median final : public Combiner {
 public:
  explicit Median(std::size_t k)
      : k_(k), step_(piece_elements(k)), network_(middle_network(k)), keys_(k * step_) {}

  bool combine(Dtype dtype, const void* const* inputs, const void* base, void* out,
               std::uint64_t nbytes) override {
    const std::size_t width = item_size(dtype);
    switch (dtype) {
      case Dtype::kF64:
      case Dtype::kF32:
      case Dtype::kF16:
      case Dtype::kBF16:
        return for_pieces(dtype, inputs, nbytes / width, [&](std::size_t first, std::size_t n) {
          write(dtype, static_cast<std::uint8_t*>(out) + first * width, n);
        });
      default:
        std::memcpy(out, base != nullptr ? base : inputs[0], nbytes);
        return true;
    }
  }

  bool combine_wide(Dtype dtype, const void* const* inputs, double* out,
                    std::size_t count) override {
    return for_pieces(dtype, inputs, count, [&](std::size_t first, std::size_t n) {
      switch (dtype) {
        case Dtype::kF64:
          return widen<arith::F64>(out + first, n);
        case Dtype::kF32:
          return widen<arith::F32>(out + first, n);
        case Dtype::kF16:
          return widen<arith::F16>(out + first, n);
        default:
          return widen<arith::Bf16>(out + first, n);
      }
    });
  }

 private:
  // Calls each(first, n) for pieces of `count` elements, once the words of the two middle values (or
  // the one) of a piece lie in the rows low() and high(). False if a value is not finite.
  template <typename Each>
  bool for_pieces(Dtype dtype, const void* const* inputs, std::size_t count, const Each& each) {
    for (std::size_t first = 0; first < count; first += step_) {
      const std::size_t n = std::min(step_, count - first);
      if (!rank(dtype, inputs, first, n)) {
        return false;
      }
      each(first, n);
    }
    return true;
  }

  bool rank(Dtype dtype, const void* const* inputs, std::size_t first, std::size_t n) {
    switch (dtype) {
      case Dtype::kF64:
        return rank_keys<std::int64_t>(0x7FF0000000000000, inputs, first, n);
      case Dtype::kF32:
        return rank_keys<std::int32_t>(0x7F800000, inputs, first, n);
      case Dtype::kF16:
        return rank_keys<std::int16_t>(0x7C00, inputs, first, n);
      default:
        return rank_keys<std::int16_t>(0x7F80, inputs, first, n);
    }
  }

  template <typename Key>
  bool rank_keys(Key exponent, const void* const* inputs, std::size_t first, std::size_t n) {
    Key* const keys = row<Key>(0);
    for (std::size_t s = 0; s < k_; ++s) {
      const auto* const from = static_cast<const std::uint8_t*>(inputs[s]) + first * sizeof(Key);
      if (!read_keys<Key>(from, exponent, keys + s * step_, n)) {
        return false;
      }
    }
    for (const auto& [low, high] : network_) {
      kernels::exchange(keys + low * step_, keys + high * step_, n);
    }
    turn_back(row<Key>(low()), n);
    if (low() != high()) {
      turn_back(row<Key>(high()), n);
    }
    return true;
  }

  std::size_t low() const noexcept { return (k_ - 1) / 2; }
  std::size_t high() const noexcept { return k_ / 2; }

  template <typename Key>
  Key* row(std::size_t source) noexcept {
    return reinterpret_cast<Key*>(keys_.data()) + source * step_;
  }

  template <typename Key>
  static void turn_back(Key* keys, std::size_t n) noexcept {
    for (std::size_t i = 0; i < n; ++i) {
      keys[i] = turned(keys[i]);
    }
  }

  // The results of a piece. For the formats below binary64 the mean of two is halfway() between
  // them, rounded once.
  void write(Dtype dtype, std::uint8_t* out, std::size_t n) {
    const std::size_t width = item_size(dtype);
    const auto* const rows = reinterpret_cast<const std::uint8_t*>(keys_.data());
    const void* const middle[2] = {rows + low() * step_ * width, rows + high() * step_ * width};
    if (low() == high()) {
      std::memcpy(out, middle[0], n * width);
    } else if (dtype == Dtype::kF64) {
      for (std::size_t i = 0; i < n; ++i) {
        const double half = halfway(value<arith::F64>(low(), i), value<arith::F64>(high(), i));
        std::memcpy(out + i * width, &half, width);
      }
    } else {
      constexpr double kWeights[2] = {1, 1};
      kernels::mean_here(dtype, middle, kWeights, 2, 2, nullptr, out, n * width);
    }
  }

  template <typename Format>
  void widen(double* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
      const double a = value<Format>(low(), i);
      out[i] = low() == high() ? a : halfway(a, value<Format>(high(), i));
    }
  }

  template <typename Format>
  double value(std::size_t source, std::size_t i) noexcept {
    using Key = std::make_signed_t<typename Format::Word>;
    return Format::decode(static_cast<typename Format::Word>(row<Key>(source)[i]));
  }

  std::size_t k_;
  std::size_t step_;  // elements of a source in a piece
  std::vector<Comparator> network_;
  std::vector<std::int64_t> keys_;  // a piece of each source, source after source
};

std::size_t scratch(std::size_t k) {
  return k * piece_elements(k) * sizeof(std::int64_t) +
         middle_network(k).size() * sizeof(Comparator);
}

std::unique_ptr<Combiner> make(const std::vector<double>& weights) {
  return std::make_unique<Median>(weights.size());
}

}  // namespace

const Rule kMedian{"median", 1, {false, true, false, 1}, &scratch, &make};

}  // namespace fedcore
