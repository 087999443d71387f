// All kinds of stages. Each is defined in a source file of its own; a new one gets two lines here.
#pragma once

#include "codec/stage.hpp"

namespace fedcore {

extern const StageKind kClip;   // clip.cpp
extern const StageKind kLimit;  // limit.cpp

// In the order in which errors name them.
inline constexpr const StageKind* kStageKinds[] = {&kClip, &kLimit};

}  // namespace fedcore
