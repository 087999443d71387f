// Which tensors of the output and of its sources are the factors of which group, for the rules of lora.hpp.
//
// Immutable once made; usable from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "factors/stack.hpp"
#include "format/layout.hpp"
#include "reduce/lora.hpp"

namespace fedcore::lora {

// Which group a tensor of the output is in, and as which of its factors.
struct Member {
  std::size_t group;
  bool is_b;
};

// A group in the output.
struct Pair {
  const Tensor* b;
  const Tensor* a;
  factors::Shape shape;
  std::size_t rank;
};

// What all combiners of a rule share.
struct Table {
  std::shared_ptr<const Layout> layout;
  LoraOptions options;
  std::shared_ptr<LoraReports> reports;
  std::vector<Pair> pairs;
  std::map<const Tensor*, Member> members;

  const Member* member(const Tensor& tensor) const {
    const auto found = members.find(&tensor);
    return found != members.end() ? &found->second : nullptr;
  }
};

// A group's factors in a source; nullptr for one that it lacks.
struct Found {
  const Tensor* b;
  const Tensor* a;
  std::size_t rank;
};

// The length of an axis.
inline std::uint64_t axis(const Tensor& tensor, std::size_t i) {
  return static_cast<std::uint64_t>(tensor.shape[i]);
}

// A tensor by its name, or nullptr: a search among those of each size of elements.
const Tensor* find_tensor(const Layout& layout, const std::string& name);

// The tensor that holds a flat byte.
const Tensor& tensor_at(const Layout& layout, std::uint64_t offset);

// Fills in `pairs` and `members`. Throws Error{kLayout} for groups that the layout does not have.
void add_pairs(Table& table);

// Throws Error{kLayout} where a source's factors are not those of the group.
Found find_pair(const Table& table, const Layout& source, const Pair& pair);

// Rule::needs of these rules.
std::vector<Range> needs_of(const Table& table, const Layout& out, Range range,
                            const std::vector<const Layout*>& sources, std::size_t k);

}  // namespace fedcore::lora
