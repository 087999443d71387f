#include "factors/loops.hpp"

#include "kernels/kernels.hpp"

#define FEDCORE_INLINE inline __attribute__((always_inline))

namespace fedcore::factors {
namespace {

#define FEDCORE_BODIES "factors/loops.inl"
#include "kernels/levels.inl"

#define FEDCORE_LOOPS(level) &level::kLoops
constexpr const Loops* kLevels[] = {FEDCORE_FOR_LEVELS(FEDCORE_LOOPS)};

}  // namespace

const Loops& loops() { return *kLevels[kernels::level()]; }

}  // namespace fedcore::factors
