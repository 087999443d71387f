// All kinds of finishers. Each is defined in a source file of its own; a new one gets two lines here.
#pragma once

#include "reduce/finish.hpp"

namespace fedcore {

extern const FinisherKind kMomentum;  // momentum.cpp

// In the order in which documentation names them.
inline constexpr const FinisherKind* kFinishers[] = {&kMomentum};

}  // namespace fedcore
