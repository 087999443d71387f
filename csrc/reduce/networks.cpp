#include "reduce/networks.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include "kernels/arith.hpp"
#include "kernels/kernels.hpp"
#include "reduce/comparators.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fedcore {
namespace {

constexpr std::size_t kLeastInRegisters = 2;

struct NetworksOf {
  NetworkFn for_sources[kMostInRegisters - kLeastInRegisters + 1];
};
struct Networks {
  NetworksOf of_16[2], of_32[2];  // all ranks, and the middle ones
};

// Batcher's network of k sources: the comparators that sort each half, and then all of them.
template <std::size_t k>
struct Network {
  std::uint8_t low[kMostInRegisters * kMostInRegisters / 2];
  std::uint8_t high[kMostInRegisters * kMostInRegisters / 2];
  std::size_t halves = 0, all = 0;

  constexpr Network() : low(), high() {
    for_comparators(k, [this](std::size_t p, std::size_t i, std::size_t j) {
      low[all] = static_cast<std::uint8_t>(i);
      high[all] = static_cast<std::uint8_t>(j);
      ++all;
      halves = 2 * p < k ? all : halves;
    });
  }
};
template <std::size_t k>
constexpr Network<k> kNetwork;

// What is this far ahead is asked for, as in kernels.inl.
constexpr std::size_t kAhead = 4096, kLine = 64;

#define FEDCORE_BODIES "reduce/networks.inl"
#include "kernels/levels.inl"

#define FEDCORE_NETWORKS(level) &level::kNetworks
constexpr const Networks* kLevels[] = {FEDCORE_FOR_LEVELS(FEDCORE_NETWORKS)};

}  // namespace

NetworkFn network_for(Dtype dtype, std::size_t k, bool middle) {
  if (k < kLeastInRegisters || k > kMostInRegisters || dtype == Dtype::kF64) {
    return nullptr;
  }
  const Networks& networks = *kLevels[kernels::level()];
  const NetworksOf* const of = dtype == Dtype::kF32 ? networks.of_32 : networks.of_16;
  return of[middle ? 1 : 0].for_sources[k - kLeastInRegisters];
}

}  // namespace fedcore
