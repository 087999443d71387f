#include "reduce/rule.hpp"

#include <iterator>
#include <string>

#include "base/error.hpp"
#include "kernels/kernels.hpp"
#include "reduce/families.hpp"

namespace fedcore {

int Combiner::combine_on_device(Dtype, const void* const*, const std::uint8_t*, const void*, void*,
                                std::size_t) noexcept {
  return FC_MEAN_DECLINED;
}

void Combiner::fold(Dtype, std::size_t, const void*, double*, std::uint64_t) {
  throw Error(Errc::kConfig, "this rule can't take one input after the other");
}

void Combiner::finish_fold(Dtype, const double*, void*, std::uint64_t) {
  throw Error(Errc::kConfig, "this rule can't take one input after the other");
}

void Combiner::finish_fold_wide(Dtype, const double*, double*, std::size_t) {
  throw Error(Errc::kConfig, "this rule can't take one input after the other");
}

void check_weights(const Rule& rule, const std::vector<std::uint64_t>& weights) {
  const std::string name(rule.name);
  if (weights.empty()) {
    throw Error(Errc::kWeight, "the rule '" + name + "' needs at least one input");
  }
  for (const std::uint64_t weight : weights) {
    if (!kernels::is_weight(weight)) {
      throw Error(Errc::kWeight,
                  "weight " + std::to_string(weight) + ": expected " + kernels::kWeightRule);
    }
  }
  if (weights.size() < rule.traits.least) {
    throw Error(Errc::kConfig, "the rule '" + name + "' needs at least " +
                                   std::to_string(rule.traits.least) + " inputs, got " +
                                   std::to_string(weights.size()));
  }
  if (weights.size() > rule.traits.most) {
    throw Error(Errc::kConfig, "the rule '" + name + "' takes at most " +
                                   std::to_string(rule.traits.most) + " inputs, got " +
                                   std::to_string(weights.size()));
  }
}

const std::vector<const Rule*>& rules() {
  static const std::vector<const Rule*> all(std::begin(kRules), std::end(kRules));
  return all;
}

const Rule& find_rule(std::string_view name) {
  if (name == kCopy.name) {
    return kCopy;
  }
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
