// The kinds that stage.cpp lists. Each is defined in a source file of its own.
#pragma once

#include "codec/stage.hpp"

namespace fedcore {

extern const StageKind kLimit;  // limit.cpp

}  // namespace fedcore
