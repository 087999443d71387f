// Pairs: how far apart each two of K sources are, for rules that go by neighbours (Krum).
//
// The squared distance of two sources is the sum of the squares of the differences of their values in
// binary64, over all elements of float dtypes. All of its terms have one sign, so nothing cancels: its
// relative error is below 1e-9, however near the two are to each other. Equal sources have exactly 0.
// The sum has a fixed tree (8 lanes, pieces, blocks, segments), so its bits depend on the files alone:
// not on threads, nor on the instruction set. A square beyond binary64's range is infinite.
//
// Owns nothing after the call. Cost: one pass over the files, and K (K - 1) / 2 multiplications an
// element; K pieces of 256 binary64 numbers for each thread, and 64 x K (K - 1) / 2 sums in all.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/mapped_file.hpp"
#include "reduce/files.hpp"

namespace fedcore {

struct Distances {
  // Of each pair (0, 1), (0, 2), ... (1, 2), ...; of no use where `bad` is there.
  std::vector<double> squares;
  // The first value that is not finite (lowest tensor, element, source).
  std::optional<FileBadValue> bad;
};

// `progress` runs on the calling thread, with the bytes of one source that are done; what it throws
// stops the work. The tensors' out_offset is not looked at. Throws Error{kLayout} as reduce_files().
Distances pair_distances(const std::vector<std::shared_ptr<MappedFile>>& inputs,
                         const std::vector<FileTensor>& tensors, unsigned threads,
                         const std::function<void(std::uint64_t)>& progress);

}  // namespace fedcore
