#include "reduce/finish_bodies.hpp"

#include <cstdint>
#include <iterator>
#include <string_view>

#include "kernels/arith.hpp"
#include "kernels/kernels.hpp"
#include "reduce/finish.hpp"

namespace fedcore {
namespace {

// What arrives in a frame has no alignment.
typedef std::uint16_t UnalignedU16 __attribute__((aligned(1), may_alias));
typedef std::uint32_t UnalignedU32 __attribute__((aligned(1), may_alias));
typedef std::uint64_t UnalignedU64 __attribute__((aligned(1), may_alias));

// No iteration of the loop reads what another one writes.
#if defined(__clang__)
#define FEDCORE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FEDCORE_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Vectors only pass between functions that are always inlined: how a call would pass them is moot.
#pragma GCC diagnostic ignored "-Wpsabi"

#define FEDCORE_LANES 4
namespace baseline {
#include "reduce/finish_bodies.inl"
}  // namespace baseline

#define FEDCORE_BODIES(level, Kind, Word) &level::finish<level::Kind, Word>

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include "reduce/finish_bodies.inl"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#undef FEDCORE_LANES
#define FEDCORE_LANES 8
namespace avx512 {
#include "reduce/finish_bodies.inl"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

constexpr const FinishStages* kStages[] = {&baseline::kStages, &avx2::kStages, &avx512::kStages};
#define FEDCORE_LEVELS(Kind, Word)                                         \
  {FEDCORE_BODIES(baseline, Kind, Word), FEDCORE_BODIES(avx2, Kind, Word), \
   FEDCORE_BODIES(avx512, Kind, Word)}

#else

constexpr const FinishStages* kStages[] = {&baseline::kStages};
#define FEDCORE_LEVELS(Kind, Word) {FEDCORE_BODIES(baseline, Kind, Word)}

#endif

template <typename Kind>
constexpr FinisherKind kind_of(const FinisherKind::Bodies& bodies) {
  return {Kind::kName, Kind::kVersion, Kind::kStates, Kind::kOptions, bodies};
}

#define FEDCORE_KIND(Kind) \
  kind_of<baseline::Kind>({FEDCORE_LEVELS(Kind, float), FEDCORE_LEVELS(Kind, double)}),
constexpr FinisherKind kKinds[] = {FEDCORE_FINISHERS(FEDCORE_KIND)};

}  // namespace

const FinishStages& finish_stages() { return *kStages[kernels::level()]; }

const std::vector<const FinisherKind*>& finisher_kinds() {
  static const std::vector<const FinisherKind*> all = [] {
    std::vector<const FinisherKind*> kinds;
    for (const FinisherKind& kind : kKinds) {
      kinds.push_back(&kind);
    }
    return kinds;
  }();
  return all;
}

}  // namespace fedcore
