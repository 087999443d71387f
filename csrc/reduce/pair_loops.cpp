#include "reduce/pair_loops.hpp"

#include "kernels/arith.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {
namespace {

#define FEDCORE_BODIES "reduce/pairs.inl"
#include "kernels/levels.inl"

#define FEDCORE_LOOPS(level) &level::kLoops
constexpr const PairLoops* kLevels[] = {FEDCORE_FOR_LEVELS(FEDCORE_LOOPS)};

}  // namespace

const PairLoops& pair_loops() { return *kLevels[kernels::level()]; }

}  // namespace fedcore
