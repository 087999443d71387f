// The finishers that finish.cpp lists. Each is defined in a source file of its own.
#pragma once

#include "reduce/finish.hpp"

namespace fedcore {

extern const FinisherKind kMomentum;  // momentum.cpp

}  // namespace fedcore
