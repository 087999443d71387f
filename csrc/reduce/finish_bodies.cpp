#include "reduce/finish_bodies.hpp"

#include <cstdint>
#include <iterator>
#include <string_view>

#include "kernels/arith.hpp"
#include "kernels/kernels.hpp"
#include "reduce/finish.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

constexpr std::size_t kAhead = 4096;

#define FEDCORE_BODIES "reduce/finish_bodies.inl"
#include "kernels/levels.inl"

#define FEDCORE_STAGES(level) &level::kStages
constexpr const FinishStages* kStages[] = {FEDCORE_FOR_LEVELS(FEDCORE_STAGES)};

template <typename Kind>
constexpr FinisherKind kind_of(const FinisherKind::Bodies& bodies) {
  return {Kind::kName, Kind::kVersion, Kind::kStates, Kind::kOptions, bodies};
}

#define FEDCORE_BODY(level, Kind, Word) &level::finish<level::Kind, Word>
#define FEDCORE_DIRECT(level, Kind, Format) &level::finish_direct<level::Kind, level::Format, float>
#define FEDCORE_KIND(Kind)                                                        \
  kind_of<baseline::Kind>({{FEDCORE_FOR_LEVELS(FEDCORE_BODY, Kind, float)},       \
                           {FEDCORE_FOR_LEVELS(FEDCORE_BODY, Kind, double)},      \
                           {FEDCORE_FOR_LEVELS(FEDCORE_DIRECT, Kind, DirectF32)}, \
                           {FEDCORE_FOR_LEVELS(FEDCORE_DIRECT, Kind, DirectBf16)}}),
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
