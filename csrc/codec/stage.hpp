// Stage: what changes an update's differences before they are encoded: clipping, a grid, noise, a
// mask. This page is the contract; a stage is one source file beside it and one line in stage.cpp.
//
// A codec has a list of stages. For each float run of a chunk, encoded or raw, it computes
// values - base + residual in binary32, applies the stages in their order, and encodes what comes
// out; a raw run holds base + that. What the encoding lost is relative to what the last stage gave,
// so that the next update does not bring back what a stage took away.
//
// A Stage is immutable, and is called from several threads at once.
//   - apply() changes differences in place. `part` says which: their dtype in the layout, and the
//     flat bytes that they belong to. The result depends on the differences and their place alone:
//     not on how a run is cut into parts, on threads, or on the instruction set.
//   - What it gets is finite, and what it gives must be: NaN or infinity is refused by name.
// Cost: one pass over a piece that is in the cache.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "format/layout.hpp"

namespace fedcore {

class Stage {
 public:
  virtual ~Stage() = default;
  // Changes the part.nbytes / item_size(part.dtype) differences in place.
  virtual void apply(const Run& part, float* differences) const = 0;
};

// A kind of stage: a name, and what makes one of the number that it is set to. make() throws
// Error{kConfig} for a number out of range.
struct StageKind {
  std::string_view name;
  std::shared_ptr<const Stage> (*make)(double value);
};

// All kinds, in the order in which errors name them.
const std::vector<const StageKind*>& stage_kinds();

// Throws Error{kConfig} that names the known kinds, or what make() throws.
std::shared_ptr<const Stage> make_stage(std::string_view name, double value);

}  // namespace fedcore
