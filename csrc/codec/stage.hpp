// Stage: what changes an update's differences before they are encoded: clipping, a grid, noise, a
// mask. This page is the contract; a stage is one source file beside it and two lines in
// stage_kinds.hpp.
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
//
// A stage that depends on the whole update, such as a clip by its norm, sums over it first:
//   - asks_first(): before the update is encoded, sum() is called for all of its differences, as the
//     stages before this one give them, and fitted() makes the stage that is applied, which asks for
//     nothing more. encode_update() alone does so; a codec refuses a stage that was not fitted.
//   - bounds(): the stage promises something of what the receiver gets. The encoding rounds, and may
//     break that. So sum() is called for what the receiver decodes, less the base, too. Where
//     tightened() makes another stage of these sums, the update is encoded again with that one. The
//     stage must give differences for which it makes none in the end. It is asked only where all
//     stages behind it bound too: noise would break the bound on purpose.
// Sums are the same bits with any number of threads: each chunk has its own, which are added in the
// order of the chunks.
// Cost: one pass over a piece that is in the cache; of a first pass, one more over the files.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "format/layout.hpp"

namespace fedcore {

// Eight sums. Element i of a part belongs to the one with number i % 8, so that a loop over them has
// one order of additions on every instruction set.
using StageSums = std::array<double, 8>;

class Stage {
 public:
  virtual ~Stage() = default;
  // Changes the part.nbytes / item_size(part.dtype) differences in place.
  virtual void apply(const Run& part, float* differences) const = 0;

  virtual bool asks_first() const noexcept { return false; }
  virtual bool bounds() const noexcept { return false; }
  // Adds what the stage wants to know of a part. A part begins at a multiple of 8 elements of its run.
  virtual void sum(const Run& /*part*/, const float* /*differences*/, StageSums& /*sums*/) const {}
  // What the sums come to, for the log: such as the norm.
  virtual double figure(const StageSums& /*sums*/) const { return 0; }
  // The stage to apply to an update of these sums.
  virtual std::shared_ptr<const Stage> fitted(const StageSums& /*sums*/) const { return nullptr; }
  // nullptr where an update that decodes to these sums is within the bound.
  virtual std::shared_ptr<const Stage> tightened(const StageSums& /*decoded*/) const {
    return nullptr;
  }
};

using Stages = std::vector<std::shared_ptr<const Stage>>;

// A kind of stage: its name, the names of its options, and what makes one of their values, in that
// order. make() throws Error{kConfig} for a value out of range.
struct StageKind {
  std::string_view name;
  std::span<const std::string_view> options;
  std::shared_ptr<const Stage> (*make)(const double* options);
};

// All kinds, in the order in which errors name them.
const std::vector<const StageKind*>& stage_kinds();

// Throws Error{kConfig} that names the known kinds, or the options of this one, or what make() throws.
std::shared_ptr<const Stage> make_stage(std::string_view name,
                                        const std::vector<std::pair<std::string, double>>& options);

}  // namespace fedcore
