// The rules that rule.cpp lists. Each is defined in the source file of its family.
#pragma once

#include "reduce/rule.hpp"

namespace fedcore {

extern const Rule kMean;    // mean.cpp
extern const Rule kMedian;  // median.cpp

}  // namespace fedcore
