#include "reduce/rule.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>

#include "base/error.hpp"
#include "kernels/kernels.hpp"
#include "reduce/families.hpp"

namespace fedcore {
namespace {

constexpr int kWeightBits = 24;
constexpr int kWeightExponent = 64;

}  // namespace

int Combiner::combine_on_device(Dtype, const void* const*, const std::uint8_t*, const void*, void*,
                                std::size_t) noexcept {
  return FC_MEAN_DECLINED;
}

bool Combiner::combine(Dtype, const void* const*, const void*, void*, std::uint64_t) {
  throw Error(Errc::kConfig, "this rule needs views of its sources");
}

bool Combiner::combine_wide(Dtype, const void* const*, double*, std::size_t) {
  throw Error(Errc::kConfig, "this rule needs views of its sources");
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

void Combiner::see(const Layout&, Range, std::span<const View>) {
  throw Error(Errc::kConfig, "this rule sees an element of each source alone");
}

void Combiner::combine_seen(Dtype, std::uint64_t, const void*, double*, std::size_t) {
  throw Error(Errc::kConfig, "this rule sees an element of each source alone");
}

std::vector<Range> needed(const Rule& rule, const Layout& out, Range range,
                          const std::vector<const Layout*>& sources, std::size_t k) {
  if (rule.needs != nullptr) {
    return rule.needs(out, range, sources, k);
  }
  if (rule.traits.unit == Unit::kElement) {
    return {range};
  }
  std::vector<Range> tensors;
  for (const Tensor& tensor : out.tensors()) {
    if (tensor.offset < range.offset + range.nbytes &&
        range.offset < tensor.offset + tensor.nbytes) {
      tensors.push_back({tensor.offset, tensor.nbytes});
    }
  }
  return tensors;
}

double effective_weight(double weight) noexcept {
  int exponent = 0;
  const double part = std::frexp(weight, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(part, kWeightBits)), exponent - kWeightBits);
}

void check_weights(const Rule& rule, const std::vector<std::uint64_t>& weights) {
  for (const std::uint64_t weight : weights) {
    if (!kernels::is_weight(weight)) {
      throw Error(Errc::kWeight,
                  "weight " + std::to_string(weight) + ": expected " + kernels::kWeightRule);
    }
  }
  check_weights(rule, std::vector<double>(weights.begin(), weights.end()));
}

void check_weights(const Rule& rule, const std::vector<double>& weights) {
  const std::string name(rule.name);
  if (weights.empty()) {
    throw Error(Errc::kWeight, "the rule '" + name + "' needs at least one input");
  }
  for (const double weight : weights) {
    const bool fits = std::isfinite(weight) && effective_weight(weight) == weight &&
                      (weight == 0 || std::abs(std::ilogb(weight)) <= kWeightExponent);
    if (!fits || (weight <= 0 && !rule.traits.real_weights)) {
      throw Error(Errc::kWeight, "weight " + std::to_string(weight) + ": expected a " +
                                     (rule.traits.real_weights ? "" : "positive ") +
                                     "number of at most 24 significant bits");
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

std::shared_ptr<const Rule> rule_with(const Rule& rule,
                                      const std::map<std::string, double>& options) {
  const std::string name(rule.name);
  for (const auto& [option, number] : options) {
    if (std::find(rule.options.begin(), rule.options.end(), option) == rule.options.end()) {
      std::string why = "the rule '" + name;
      why.append("' has no option '").append(option).append("'");
      throw Error(Errc::kConfig, why);
    }
  }
  if (rule.options.empty()) {
    return known_rule(rule);
  }
  std::vector<double> numbers;
  for (const std::string_view option : rule.options) {
    const auto given = options.find(std::string(option));
    if (given == options.end()) {
      throw Error(Errc::kConfig,
                  "the rule '" + name + "' needs its option '" + std::string(option) + "'");
    }
    numbers.push_back(given->second);
  }
  return std::make_shared<const Rule>(rule.with(numbers));
}

}  // namespace fedcore
