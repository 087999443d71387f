#include "reduce/rule.hpp"

#include <string>

#include "base/error.hpp"
#include "reduce/families.hpp"

namespace fedcore {

const std::vector<const Rule*>& rules() {
  static const std::vector<const Rule*> all{&kMean, &kMedian};
  return all;
}

const Rule& find_rule(std::string_view name) {
  std::string known;
  for (const Rule* const rule : rules()) {
    if (rule->name == name) {
      return *rule;
    }
    known += (known.empty() ? "" : ", ") + std::string(rule->name);
  }
  throw Error(Errc::kConfig,
              "no rule is named '" + std::string(name) + "'; expected one of " + known);
}

}  // namespace fedcore
