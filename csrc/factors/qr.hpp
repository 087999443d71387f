// The triangle R of one side of a stack, and Q times a few columns.
//
// Householder reflections in binary64, without pivoting. The rows come in tiles that fit a processor's
// cache: the first one is reduced alone, and each other one together with the triangle so far (Golub
// and Van Loan, Matrix Computations, 5.1 and 12.2). Blocks of rows are reduced independently, by several
// threads, and then their triangles below each other. Columns of very different norms do not spoil each
// other. The numbers depend on the stack alone. Memory: a tile for each thread, or where Q is kept, columns x
// rows binary64 numbers. Cost: 2 x rows x columns^2 operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/workers.hpp"
#include "factors/loops.hpp"
#include "factors/stack.hpp"

namespace fedcore::factors {

inline constexpr std::size_t kTileRows = 512;
inline constexpr std::size_t kBlockRows = 2048;  // of a block, at least

// Calls part(0) to part(count - 1), on these threads or, for nullptr, one after the other.
void run_parts(Workers* workers, std::size_t count, const std::function<void(std::size_t)>& part);

// Writes `count` rows from `first` on, as columns that lie `stride` numbers apart.
using ReadRows =
    std::function<void(std::uint64_t first, std::size_t count, double* to, std::size_t stride)>;

// Rows of the first tile, and the distance of columns in a tile of so many rows: no power of two, so that
// the columns do not share the same places of a cache.
std::size_t first_tile_rows(std::uint64_t rows, std::size_t columns) noexcept;
constexpr std::size_t tile_stride(std::size_t rows) noexcept { return padded(rows) + kLanes; }

// Of one block. Not thread-safe.
class TiledQr {
 public:
  // `keep`: whether apply() is going to be called.
  TiledQr(const ReadRows& read, std::uint64_t rows, std::size_t columns, bool keep);

  // R has height() rows of columns() numbers, `stride()` apart; what is below the diagonal is 0.
  std::size_t height() const noexcept { return height_; }
  std::size_t stride() const noexcept { return stride_; }
  const double* row(std::size_t i) const noexcept { return r_.data() + i * stride_; }

  // Q times a matrix of height() rows of `columns` numbers, `stride` apart. `take` gets it in pieces of
  // rows, the last ones first: columns, `stride` apart.
  using Take = std::function<void(std::uint64_t first, std::size_t rows, const double* columns,
                                  std::size_t stride)>;
  void apply(std::vector<double> top, std::size_t columns, std::size_t stride,
             const Take& take) const;

 private:
  struct Tile {
    std::uint64_t first;
    std::size_t rows, stride;
    std::vector<double> vectors;  // first columns, then what each reflection has in the tile
    std::vector<double> tops;     // what it has in the row of the triangle
    std::vector<double> factors;  // 0: there is none
  };

  void reduce_first(Tile& tile);
  void reduce(Tile& tile);

  const Loops& loops_;
  std::size_t columns_, height_, stride_;
  std::vector<double> r_, by_;
  std::vector<Tile> tiles_;
};

// Of a side of a stack. One thread at a time calls its methods.
class SideQr {
 public:
  // `keep`: whether apply() is going to be called.
  SideQr(const Stack& stack, Side side, bool keep, Workers* workers);

  // R, as TiledQr has it.
  const TiledQr& triangle() const noexcept { return top_ ? *top_ : *blocks_[0]; }
  // As TiledQr::apply(); `take` is called by several threads, for other rows each.
  void apply(std::vector<double> top, std::size_t columns, std::size_t stride,
             const TiledQr::Take& take) const;

 private:
  Workers* workers_;
  std::uint64_t block_rows_;
  std::vector<std::unique_ptr<TiledQr>> blocks_;
  std::unique_ptr<TiledQr> top_;  // of the blocks' triangles; null for one block
};

}  // namespace fedcore::factors
