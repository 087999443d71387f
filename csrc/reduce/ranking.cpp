#include "reduce/ranking.hpp"

#include <cstring>
#include <type_traits>

#include "kernels/kernels.hpp"
#include "reduce/comparators.hpp"
#include "reduce/networks.hpp"

namespace fedcore {
namespace {

// Elements of a source in a piece, so that the pieces of all sources stay in the cache.
std::size_t piece_elements(std::size_t k) {
  constexpr std::size_t kCached = 128u << 10, kLeast = 64, kMost = 1024;
  return std::clamp(kCached / (k * sizeof(std::int64_t)) / kLeast * kLeast, kLeast, kMost);
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

// The bits of infinity.
std::int64_t exponent_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64:
      return 0x7FF0000000000000;
    case Dtype::kF32:
      return 0x7F800000;
    case Dtype::kF16:
      return 0x7C00;
    default:
      return 0x7F80;
  }
}

}  // namespace

Ranking::Ranking(std::size_t k, std::size_t first, std::size_t last)
    : k_(k),
      first_(first),
      last_(last),
      step_(piece_elements(k)),
      network_(network(k, first, last)),
      keys_(k * step_) {}

std::size_t Ranking::scratch(std::size_t k, std::size_t first, std::size_t last) {
  return k * piece_elements(k) * sizeof(std::int64_t) +
         network(k, first, last).size() * sizeof(Comparator);
}

// The comparators, first to last, that the wanted ranks depend on.
std::vector<Ranking::Comparator> Ranking::network(std::size_t k, std::size_t first,
                                                  std::size_t last) {
  std::vector<Comparator> all, kept;
  for_comparators(k, [&](std::size_t, std::size_t low, std::size_t high) {
    all.emplace_back(static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(high));
  });
  std::vector<bool> needed(k, false);
  for (std::size_t rank = first; rank <= last; ++rank) {
    needed[rank] = true;
  }
  for (auto at = all.rbegin(); at != all.rend(); ++at) {
    if (needed[at->first] || needed[at->second]) {
      needed[at->first] = needed[at->second] = true;
      kept.push_back(*at);
    }
  }
  std::reverse(kept.begin(), kept.end());
  return kept;
}

bool Ranking::rank(Dtype dtype, const void* const* inputs, std::size_t at, std::size_t n) {
  const bool middle = first_ == (k_ - 1) / 2 && last_ == k_ / 2;
  const std::int64_t exponent = exponent_of(dtype);
  if (const NetworkFn network = network_for(dtype, k_, middle)) {
    const NetworkPiece piece{inputs,
                             at,
                             n,
                             first_,
                             last_,
                             reinterpret_cast<std::uint8_t*>(keys_.data()),
                             step_ * item_size(dtype)};
    return network(piece, exponent);
  }
  switch (dtype) {
    case Dtype::kF64:
      return rank_keys<std::int64_t>(exponent, inputs, at, n);
    case Dtype::kF32:
      return rank_keys<std::int32_t>(static_cast<std::int32_t>(exponent), inputs, at, n);
    default:
      return rank_keys<std::int16_t>(static_cast<std::int16_t>(exponent), inputs, at, n);
  }
}

template <typename Key>
bool Ranking::rank_keys(Key exponent, const void* const* inputs, std::size_t at, std::size_t n) {
  Key* const keys = reinterpret_cast<Key*>(keys_.data());
  for (std::size_t s = 0; s < k_; ++s) {
    const auto* const from = static_cast<const std::uint8_t*>(inputs[s]) + at * sizeof(Key);
    if (!read_keys<Key>(from, exponent, keys + s * step_, n)) {
      return false;
    }
  }
  for (const auto& [low, high] : network_) {
    kernels::exchange(keys + low * step_, keys + high * step_, n);
  }
  for (std::size_t rank = first_; rank <= last_; ++rank) {
    Key* const row = keys + rank * step_;
    for (std::size_t i = 0; i < n; ++i) {
      row[i] = turned(row[i]);
    }
  }
  return true;
}

}  // namespace fedcore
