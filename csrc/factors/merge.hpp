// merge(): recompress() for sums of any number of columns.
//
// A stack of more than kMostColumns columns is merged in a binary tree over the order of the terms: each
// half is brought to kMostColumns / 2 columns, or to the rank of the result where that is more, before
// the two are put together. Halves of the list are halved again. The tree depends on the ranks alone, so the
// numbers do, too. What the inner nodes cut off is reported with the rest. Pure functions.
#pragma once

#include <cstddef>
#include <vector>

#include "factors/recompress.hpp"
#include "factors/stack.hpp"

namespace fedcore::factors {

inline constexpr std::size_t kMostColumns = 256;

// As recompress(). `cut` is a bound where the tree has inner nodes: the sum of what each cut off.
Factors merge(Shape shape, const std::vector<Term>& terms, std::size_t most, double divisor = 1,
              Workers* workers = nullptr);

// Bytes of memory that it takes besides its result and what the readers take, for terms of so many
// columns together.
std::size_t merge_scratch(Shape shape, std::size_t columns, std::size_t most,
                          unsigned threads = 1) noexcept;

}  // namespace fedcore::factors
