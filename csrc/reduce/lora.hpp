// The rules for adapters: pairs of factors, of which the product counts.
//
// A group is a module's pair of tensors, B (rows x rank) and A (rank x columns), whose product is what
// the adapter adds to the module. A source may have fewer ranks than the output. What is in no group
// gets the plain mean. What no source has, such as a frozen A, is copied from the base.
//   kFactors     the plain mean of each factor, with zeros for ranks that a source lacks; the bits are
//                those of the rule "mean"
//   kExact       the base's product W, plus the weighted mean of each source's product less the best part
//                of W of the source's rank, which is what the source was given: of the rank of the output
//   kProducts    the weighted mean of the sources' products, of the rank of the output
// The output of the last two has the form of recompress(), so the best part of a lower rank r is the
// first r columns of B and rows of A. They take the base in that form.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "format/layout.hpp"
#include "reduce/rule.hpp"

namespace fedcore {

enum class LoraMethod : std::uint8_t { kFactors, kExact, kProducts };

struct LoraGroup {
  std::string b, a;  // names of tensors
};

// What became of a group. Norms are Frobenius's.
struct LoraReport {
  double sum = 0;        // of the weighted mean of the products
  double change = 0;     // of what that adds to what the sources were given
  double error = 0;      // of the difference between it and the product of the mean factors
  double cut = 0;        // of what the output's rank has no room for
  std::size_t rank = 0;  // numerical, of the output; 0 for kFactors
};

// The reports of groups whose output was made. Usable from any thread.
class LoraReports {
 public:
  explicit LoraReports(std::size_t groups) : reports_(groups) {}
  void put(std::size_t group, const LoraReport& report);
  std::vector<std::optional<LoraReport>> all() const;

 private:
  mutable std::mutex mutex_;
  std::vector<std::optional<LoraReport>> reports_;
};

struct LoraOptions {
  LoraMethod method;
  std::vector<LoraGroup> groups;
  std::size_t most_rank;  // of a source
  bool figure = true;     // whether reports have sum, change and error: they take time of their own
  unsigned threads = 1;   // that make a group
};

// A rule for outputs of this layout. Throws Error{kLayout} for groups that it does not have, or whose
// shapes do not fit. `reports` may be nullptr.
std::shared_ptr<const Rule> lora_rule(std::shared_ptr<const Layout> layout, LoraOptions options,
                                      std::shared_ptr<LoraReports> reports);

}  // namespace fedcore
