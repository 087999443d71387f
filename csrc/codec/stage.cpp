#include "codec/stage.hpp"

#include <algorithm>
#include <iterator>
#include <string>

#include "base/error.hpp"
#include "codec/stage_kinds.hpp"

namespace fedcore {
namespace {

const StageKind& find_kind(std::string_view name) {
  std::string known;
  for (const StageKind* const kind : stage_kinds()) {
    if (kind->name == name) {
      return *kind;
    }
    known += (known.empty() ? "" : ", ") + std::string(kind->name);
  }
  throw Error(Errc::kConfig,
              "no stage is named '" + std::string(name) + "'; expected one of " + known);
}

}  // namespace

const std::vector<const StageKind*>& stage_kinds() {
  static const std::vector<const StageKind*> all(std::begin(kStageKinds), std::end(kStageKinds));
  return all;
}

std::shared_ptr<const Stage> make_stage(
    std::string_view name, const std::vector<std::pair<std::string, double>>& options) {
  const StageKind& kind = find_kind(name);
  std::vector<double> values;
  std::string known;
  for (const std::string_view option : kind.options) {
    known += (known.empty() ? "" : ", ") + std::string(option);
    for (const auto& [given, value] : options) {
      if (given == option) {
        values.push_back(value);
      }
    }
  }
  if (values.size() != kind.options.size() || options.size() != kind.options.size()) {
    throw Error(Errc::kConfig, "the stage '" + std::string(name) +
                                   "' needs these options, and no others: " + known);
  }
  return kind.make(values.data());
}

}  // namespace fedcore
