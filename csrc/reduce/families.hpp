// All rules. Each is defined in the source file of its family; a new one gets two lines here.
#pragma once

#include "reduce/rule.hpp"

namespace fedcore {

extern const Rule kMean;         // mean.cpp
extern const Rule kMedian;       // median.cpp
extern const Rule kTrimmedMean;  // trimmed_mean.cpp
extern const Rule kCopy;         // copy.cpp; a download, and no choice for an aggregate

// In the order in which documentation names them.
inline constexpr const Rule* kRules[] = {&kMean, &kMedian, &kTrimmedMean};

}  // namespace fedcore
