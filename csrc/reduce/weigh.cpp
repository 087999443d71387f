#include "reduce/weigh.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>

#include "base/error.hpp"

namespace fedcore {
namespace {

// Holds the product of a number of parts and the sum of 2^44 weights.
__extension__ using Wide = unsigned __int128;

constexpr int kBits = 24;

// The greatest number of 24 significant bits that is at most over / under, which is 2^-20 at least.
double floored(Wide over, Wide under) {
  int exponent = 0;
  if (over >> kBits < under) {  // then it is below 2^44, and has room for more digits
    exponent = -2 * kBits;
    over <<= 2 * kBits;
  }
  Wide found = over / under;
  while (found >> kBits != 0) {
    found >>= 1;
    ++exponent;
  }
  return std::ldexp(static_cast<double>(static_cast<std::uint64_t>(found)), exponent);
}

// What a source weighs at most. With m sources at the bound c, and R the sum of the others:
// c = share (m c + R).
double bound(std::uint32_t share, const std::vector<double>& examples) {
  std::vector<std::uint64_t> left;
  Wide rest = 0;
  for (const double number : examples) {
    if (!(number >= 1 && number < 0x1p64 && std::trunc(number) == number)) {
      throw Error(Errc::kWeight, "a share can be bounded of whole numbers of examples alone");
    }
    left.push_back(static_cast<std::uint64_t>(number));
    rest += left.back();
  }
  std::sort(left.begin(), left.end(), std::greater<>());
  Wide parts = Weighing::kWhole;  // that the sources at the bound leave
  for (std::size_t m = 0; m < left.size() && left[m] * parts > share * rest; ++m) {
    rest -= left[m];
    parts -= share;
  }
  return floored(share * rest, parts);
}

}  // namespace

std::vector<double> weigh(const Weighing& weighing, const std::vector<double>& examples) {
  if (weighing.equal) {
    return std::vector<double>(examples.size(), 1.0);
  }
  if (weighing.max_share >= Weighing::kWhole) {
    return examples;
  }
  if (weighing.max_share * examples.size() < Weighing::kWhole) {
    throw Error(Errc::kConfig, "no site of " + std::to_string(examples.size()) +
                                   " can be held to less than an equal share");
  }
  const double most = bound(weighing.max_share, examples);
  std::vector<double> weights;
  for (const double number : examples) {
    weights.push_back(std::min(number, most));
  }
  return weights;
}

std::shared_ptr<const Rule> weighed(std::shared_ptr<const Rule> rule, const Weighing& weighing) {
  if (!weighing.equal && weighing.max_share >= Weighing::kWhole) {
    return rule;
  }
  auto made = std::make_shared<Rule>(*rule);
  made->weigh = [weighing](const std::vector<double>& examples) {
    return weigh(weighing, examples);
  };
  made->make = [rule = std::move(rule), weighing](const std::vector<double>& examples) {
    return rule->make(weigh(weighing, examples));
  };
  return made;
}

}  // namespace fedcore
