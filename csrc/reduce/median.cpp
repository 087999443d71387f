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

template <typename Format>
typename Format::Word halfway(typename Format::Word low, typename Format::Word high) {
  const double a = Format::decode(low), b = Format::decode(high);
  const double sum = a + b;
  return Format::encode(arith::non_finite(sum) != 0 ? a * 0.5 + b * 0.5 : sum * 0.5);
}

class Median final : public Combiner {
 public:
  explicit Median(std::size_t k)
      : k_(k), step_(piece_elements(k)), network_(middle_network(k)), keys_(k * step_) {}

  bool combine(Dtype dtype, const void* const* inputs, const void* base, void* out,
               std::uint64_t nbytes) override {
    switch (dtype) {
      case Dtype::kF64:
        return combine_as<arith::F64, std::int64_t>(0x7FF0000000000000, inputs, out, nbytes);
      case Dtype::kF32:
        return combine_as<arith::F32, std::int32_t>(0x7F800000, inputs, out, nbytes);
      case Dtype::kF16:
        return combine_as<arith::F16, std::int16_t>(0x7C00, inputs, out, nbytes);
      case Dtype::kBF16:
        return combine_as<arith::Bf16, std::int16_t>(0x7F80, inputs, out, nbytes);
      default:
        std::memcpy(out, base != nullptr ? base : inputs[0], nbytes);
        return true;
    }
  }

 private:
  template <typename Format, typename Key>
  bool combine_as(Key exponent, const void* const* inputs, void* out, std::uint64_t nbytes) {
    auto* const keys = reinterpret_cast<Key*>(keys_.data());
    const std::size_t count = nbytes / sizeof(Key);
    for (std::size_t first = 0; first < count; first += step_) {
      const std::size_t n = std::min(step_, count - first), at = first * sizeof(Key);
      for (std::size_t s = 0; s < k_; ++s) {
        const auto* const from = static_cast<const std::uint8_t*>(inputs[s]) + at;
        if (!read_keys<Key>(from, exponent, keys + s * step_, n)) {
          return false;
        }
      }
      for (const auto& [low, high] : network_) {
        kernels::exchange(keys + low * step_, keys + high * step_, n);
      }
      write<Format, Key>(keys, static_cast<std::uint8_t*>(out) + at, n);
    }
    return true;
  }

  template <typename Format, typename Key>
  void write(const Key* keys, std::uint8_t* out, std::size_t n) const {
    using Word = typename Format::Word;
    const Key* const low = keys + (k_ - 1) / 2 * step_;
    const Key* const high = keys + k_ / 2 * step_;
    for (std::size_t i = 0; i < n; ++i) {
      Word word = static_cast<Word>(turned(low[i]));
      if (low != high) {
        word = halfway<Format>(word, static_cast<Word>(turned(high[i])));
      }
      std::memcpy(out + i * sizeof word, &word, sizeof word);
    }
  }

  std::size_t k_;
  std::size_t step_;  // elements of a source in a piece
  std::vector<Comparator> network_;
  std::vector<std::int64_t> keys_;  // a piece of each source, source after source
};

std::size_t scratch(std::size_t k) {
  std::size_t comparators = 0;
  for_comparators(k, [&](std::size_t, std::size_t) { ++comparators; });
  return k * piece_elements(k) * sizeof(std::int64_t) + 2 * comparators * sizeof(Comparator);
}

std::unique_ptr<Combiner> make(const std::vector<double>& weights) {
  return std::make_unique<Median>(weights.size());
}

}  // namespace

const Rule kMedian{"median", 1, {false, true, false, 1}, &scratch, &make};

}  // namespace fedcore
