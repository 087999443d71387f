#include "codec/stage.hpp"

#include <string>

#include "base/error.hpp"
#include "codec/stage_kinds.hpp"

namespace fedcore {

const std::vector<const StageKind*>& stage_kinds() {
  static const std::vector<const StageKind*> all{&kLimit};
  return all;
}

std::shared_ptr<const Stage> make_stage(std::string_view name, double value) {
  std::string known;
  for (const StageKind* const kind : stage_kinds()) {
    if (kind->name == name) {
      return kind->make(value);
    }
    known += (known.empty() ? "" : ", ") + std::string(kind->name);
  }
  throw Error(Errc::kConfig,
              "no stage is named '" + std::string(name) + "'; expected one of " + known);
}

}  // namespace fedcore
