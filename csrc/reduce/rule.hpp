// Rule: what combines K updates of one layout into one result. This page is the contract; a rule is
// one source file beside it and one line in rule.cpp, and one entry in fedcore/rules/registry.py.
//
// A rule is a constant: a name, a version, its traits, and a function that makes a Combiner for
// given weights. The version changes when the same inputs give other bits.
//
// A Combiner works on one block of elements at a time. It owns its scratch memory, which does not
// grow with the block. One thread uses a Combiner; threads that share a job have one each.
//   - The bytes of the result depend on the inputs, their order and their weights alone: not on how
//     the elements are cut into blocks, on threads, or on the instruction set.
//   - Where traits.symmetric is true, they do not depend on the order either. Elsewhere the caller
//     gives the inputs in canonical order.
//   - Every input value is checked: combine() returns false if a value or a result is NaN or
//     infinite, and `out` is not to be used then.
//   - Integers and booleans are copied from `base`, or from the first input without one.
//   - The result is rounded once to the dtype of the inputs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "format/layout.hpp"

namespace fedcore {

struct Traits {
  bool weighted;      // weights change the result
  bool symmetric;     // the order of the inputs does not change the result
  bool folds;         // it can take one input after the other, and keep sums between them
  std::size_t least;  // sources that it needs at least
};

class Combiner {
 public:
  virtual ~Combiner() = default;
  // Combines one block of `nbytes` of one dtype. `inputs` holds a pointer for each weight. No
  // pointer needs alignment. `base` may be nullptr. `out` overlaps no input.
  virtual bool combine(Dtype dtype, const void* const* inputs, const void* base, void* out,
                       std::uint64_t nbytes) = 0;
};

struct Rule {
  std::string_view name;
  unsigned version;
  Traits traits;
  // Bytes of scratch memory of one Combiner for k sources.
  std::size_t (*scratch)(std::size_t k);
  // `weights` passed kernels::is_weight(); there are traits.least of them at least.
  std::unique_ptr<Combiner> (*make)(const std::vector<double>& weights);
};

// All rules, in the order in which documentation names them.
const std::vector<const Rule*>& rules();

// Throws Error{kConfig} that names the known rules.
const Rule& find_rule(std::string_view name);

}  // namespace fedcore
