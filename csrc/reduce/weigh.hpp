// Weigh: what makes the effective weights of a rule from the numbers of examples behind the updates.
//
// Weights are asked for each time a Combiner is made, of the sources that count then. So they follow
// where a source is lost, and are the same after a restart.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "reduce/rule.hpp"

namespace fedcore {

struct Weighing {
  static constexpr std::uint32_t kWhole = 1'000'000;  // parts of all weights

  bool equal = false;                // each source weighs 1
  std::uint32_t max_share = kWhole;  // no source weighs more than so many parts of the sum
};

// The effective weights. A source with more examples than its greatest share allows weighs as much as
// the other sources leave it (water-filling): min(examples, c), where c is the greatest number of 24
// significant bits with which no share is above the greatest one. It is found with integers alone,
// and does not depend on the order of the sources. Throws Error{kConfig} where the greatest share is
// less than an equal share of all sources, and Error{kWeight} where a share is bounded and a weight is
// no integer from 1 to 2^64 - 1.
std::vector<double> weigh(const Weighing& weighing, const std::vector<double>& examples);

// The rule whose sources are weighed so; the rule itself where nothing is to be done.
std::shared_ptr<const Rule> weighed(std::shared_ptr<const Rule> rule, const Weighing& weighing);

}  // namespace fedcore
