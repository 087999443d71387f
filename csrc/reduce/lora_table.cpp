#include "reduce/lora_table.hpp"

#include <algorithm>
#include <set>

#include "base/error.hpp"

namespace fedcore::lora {
namespace {

// The rank that a factor of a source has. Throws Error{kLayout} where it is no factor of the group.
std::size_t rank_of(const Table& table, const Tensor& factor, const Pair& pair, bool is_b) {
  const std::size_t most =
      table.options.method == LoraMethod::kFactors ? pair.rank : table.options.most_rank;
  const bool fits = factor.shape.size() == 2 && is_float(factor.dtype) &&
                    axis(factor, is_b ? 0 : 1) == (is_b ? pair.shape.rows : pair.shape.columns);
  const std::uint64_t rank = fits ? axis(factor, is_b ? 1 : 0) : 0;
  if (!fits || rank == 0 || rank > most) {
    throw Error(Errc::kLayout, "tensor '" + factor.name +
                                   "' of a source is no factor of rank 1 to " +
                                   std::to_string(most));
  }
  const Tensor& own = is_b ? *pair.b : *pair.a;
  if (table.options.method == LoraMethod::kFactors && factor.dtype != own.dtype) {
    throw Error(Errc::kLayout, "tensor '" + factor.name + "' of a source is of another dtype");
  }
  return static_cast<std::size_t>(rank);
}

// Whether each source has a tensor or none has. Throws Error{kLayout} otherwise.
bool all_have(const Tensor& tensor, const std::vector<const Layout*>& sources) {
  std::size_t having = 0;
  for (const Layout* const source : sources) {
    const Tensor* const own = find_tensor(*source, tensor.name);
    having += own != nullptr ? 1 : 0;
  }
  if (having != 0 && having != sources.size()) {
    throw Error(Errc::kLayout, "some sources lack the tensor '" + tensor.name + "'");
  }
  return having != 0;
}

// The same bytes of a tensor that a source may have at another place.
void add_shared(const Tensor& tensor, const Layout& source, Range range,
                std::vector<Range>& needs) {
  const Tensor* const own = find_tensor(source, tensor.name);
  if (own == nullptr) {
    return;
  }
  if (own->dtype != tensor.dtype || own->shape != tensor.shape) {
    throw Error(Errc::kLayout,
                "tensor '" + tensor.name + "' of a source has another dtype or shape");
  }
  const std::uint64_t first = std::max(range.offset, tensor.offset);
  const std::uint64_t end = std::min(range.offset + range.nbytes, tensor.offset + tensor.nbytes);
  needs.push_back({own->offset + (first - tensor.offset), end - first});
}

void check_layout(const Layout& expected, const Layout& out) {
  const auto same = [](const Tensor& one, const Tensor& other) {
    return one.name == other.name && one.dtype == other.dtype && one.shape == other.shape;
  };
  if (!std::equal(expected.tensors().begin(), expected.tensors().end(), out.tensors().begin(),
                  out.tensors().end(), same)) {
    throw Error(Errc::kLayout, "the output is not of the layout that the rule was made for");
  }
}

}  // namespace

const Tensor* find_tensor(const Layout& layout, const std::string& name) {
  const std::vector<Tensor>& all = layout.tensors();
  for (const std::size_t size : {8u, 4u, 2u, 1u}) {
    const auto found =
        std::lower_bound(all.begin(), all.end(), name, [&](const Tensor& t, const std::string& n) {
          const std::size_t own = item_size(t.dtype);
          return own != size ? own > size : t.name < n;
        });
    if (found != all.end() && found->name == name) {
      return &*found;
    }
  }
  return nullptr;
}

const Tensor& tensor_at(const Layout& layout, std::uint64_t offset) {
  const std::vector<Tensor>& all = layout.tensors();
  const auto next =
      std::upper_bound(all.begin(), all.end(), offset,
                       [](std::uint64_t at, const Tensor& tensor) { return at < tensor.offset; });
  return *std::prev(next);
}

void add_pairs(Table& table) {
  for (const LoraGroup& group : table.options.groups) {
    const Tensor* const b = find_tensor(*table.layout, group.b);
    const Tensor* const a = find_tensor(*table.layout, group.a);
    if (b == nullptr || a == nullptr) {
      throw Error(Errc::kLayout, "there is no tensor '" + (b == nullptr ? group.b : group.a) + "'");
    }
    const bool fits = b != a && b->shape.size() == 2 && a->shape.size() == 2 &&
                      axis(*b, 1) == axis(*a, 0) && b->nbytes > 0 && a->nbytes > 0;
    const bool fresh = table.members.count(b) + table.members.count(a) == 0;
    if (!fits || !fresh || !is_float(b->dtype) || !is_float(a->dtype)) {
      throw Error(Errc::kLayout, "'" + group.b + "' and '" + group.a + "' are no pair of factors");
    }
    const std::size_t index = table.pairs.size();
    table.members[b] = {index, true};
    table.members[a] = {index, false};
    table.pairs.push_back(
        {b, a, {axis(*b, 0), axis(*a, 1)}, static_cast<std::size_t>(axis(*a, 0))});
  }
}

Found find_pair(const Table& table, const Layout& source, const Pair& pair) {
  Found found{find_tensor(source, pair.b->name), find_tensor(source, pair.a->name), 0};
  const bool exact = table.options.method != LoraMethod::kFactors;
  if (exact && (found.b == nullptr || found.a == nullptr)) {
    throw Error(Errc::kLayout, "a source lacks a factor of '" + pair.b->name + "'");
  }
  const std::size_t of_b = found.b != nullptr ? rank_of(table, *found.b, pair, true) : 0;
  const std::size_t of_a = found.a != nullptr ? rank_of(table, *found.a, pair, false) : 0;
  if (of_b != 0 && of_a != 0 && of_b != of_a) {
    throw Error(Errc::kLayout, "the factors '" + pair.b->name + "' and '" + pair.a->name +
                                   "' of a source have different ranks");
  }
  // A factor that it lacks is the output's own, of the whole rank.
  found.rank = std::max(of_b, of_a);
  if ((found.b == nullptr) != (found.a == nullptr) && found.rank != pair.rank) {
    throw Error(Errc::kLayout, "a source that lacks a factor of '" + pair.b->name +
                                   "' must have the other in rank " + std::to_string(pair.rank));
  }
  return found;
}

std::vector<Range> needs_of(const Table& table, const Layout& out, Range range,
                            const std::vector<const Layout*>& sources, std::size_t k) {
  if (k == 0 && range.offset == 0) {
    check_layout(*table.layout, out);
  }
  std::vector<Range> needs;
  std::set<std::size_t> seen;
  for (std::uint64_t at = range.offset; at < range.offset + range.nbytes;) {
    const Tensor& tensor = tensor_at(out, at);
    at = tensor.offset + tensor.nbytes;
    if (!is_float(tensor.dtype)) {
      continue;  // copied from the base
    }
    const Tensor* const own = find_tensor(*table.layout, tensor.name);
    const Member* const member = own != nullptr ? table.member(*own) : nullptr;
    if (k == 0) {
      all_have(tensor, sources);
    }
    if (member == nullptr) {
      add_shared(tensor, *sources[k], range, needs);
    } else if (seen.insert(member->group).second) {
      const Found found = find_pair(table, *sources[k], table.pairs[member->group]);
      for (const Tensor* const factor : {found.b, found.a}) {
        if (factor != nullptr) {
          needs.push_back({factor->offset, factor->nbytes});
        }
      }
    }
  }
  return needs;
}

}  // namespace fedcore::lora
