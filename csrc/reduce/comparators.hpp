// The comparators of Batcher's odd-even merge sort (Knuth 5.2.2M), for any number of rows.
#pragma once

#include <algorithm>
#include <cstddef>

namespace fedcore {

// Calls each(p, low, high) for the comparators that sort k rows, first to last. Those of a p merge sorted
// groups of p rows into sorted groups of 2 p rows.
template <typename Each>
constexpr void for_comparators(std::size_t k, Each&& each) {
  for (std::size_t p = 1; p < k; p *= 2) {
    for (std::size_t step = p; step >= 1; step /= 2) {
      for (std::size_t j = step % p; j + step < k; j += 2 * step) {
        for (std::size_t i = j; i < std::min(j + step, k - step); ++i) {
          if (i / (2 * p) == (i + step) / (2 * p)) {
            each(p, i, i + step);
          }
        }
      }
    }
  }
}

}  // namespace fedcore
