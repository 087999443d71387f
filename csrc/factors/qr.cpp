#include "factors/qr.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace fedcore::factors {
namespace {

// A sum of squares below this is taken for 0: it is too close to underflow to be precise.
constexpr double kNegligible = 0x1p-960;

struct Reflection {
  double pivot;   // what becomes of the pivot
  double top;     // what the reflection has in its place
  double factor;  // 2 / (the reflection's squared norm)
};

// Reflects a column of squared norm `square`, of which `pivot` is a part, onto its first axis.
Reflection reflect(double pivot, double square) noexcept {
  const double norm = std::sqrt(square);
  const double to = pivot >= 0 ? -norm : norm;
  return {to, pivot - to, 1 / (norm * (norm + std::abs(pivot)))};
}

}  // namespace

std::size_t first_tile_rows(std::uint64_t rows, std::size_t columns) noexcept {
  return static_cast<std::size_t>(std::min<std::uint64_t>(rows, std::max(kTileRows, columns)));
}

void run_parts(Workers* workers, std::size_t count, const std::function<void(std::size_t)>& part) {
  if (workers != nullptr && count > 1) {
    workers->run(static_cast<unsigned>(count), [&part](unsigned i) { part(i); });
    return;
  }
  for (std::size_t i = 0; i < count; ++i) {
    part(i);
  }
}

TiledQr::TiledQr(const ReadRows& read, std::uint64_t rows, std::size_t columns, bool keep)
    : loops_(loops()),
      columns_(columns),
      height_(static_cast<std::size_t>(std::min<std::uint64_t>(columns, rows))),
      stride_(padded(columns_)),
      r_(height_ * stride_),
      by_(columns_) {
  Tile tile{};
  for (std::uint64_t first = 0; first < rows; first += tile.rows) {
    tile.first = first;
    tile.rows = first == 0
                    ? first_tile_rows(rows, columns_)
                    : static_cast<std::size_t>(std::min<std::uint64_t>(kTileRows, rows - first));
    tile.stride = tile_stride(tile.rows);
    tile.vectors.assign(columns_ * tile.stride, 0.0);
    tile.tops.assign(height_, 0.0);
    tile.factors.assign(height_, 0.0);
    read(first, tile.rows, tile.vectors.data(), tile.stride);
    if (first == 0) {
      reduce_first(tile);
    } else {
      reduce(tile);
    }
    if (keep) {
      tiles_.push_back(std::exchange(tile, Tile{first, tile.rows, 0, {}, {}, {}}));
    }
  }
}

void TiledQr::reduce_first(Tile& tile) {
  const std::size_t end = padded(tile.rows);
  for (std::size_t j = 0; j < columns_; ++j) {
    double* const column = tile.vectors.data() + j * tile.stride;
    const std::size_t above = std::min(j, height_);
    for (std::size_t i = 0; i < above; ++i) {
      r_[i * stride_ + j] = std::exchange(column[i], 0.0);
    }
    if (j >= height_) {
      continue;
    }
    const std::size_t from = j / kLanes * kLanes;
    const double square = loops_.dot(column + from, column + from, end - from);
    if (square < kNegligible) {
      std::fill_n(column, end, 0.0);
      continue;
    }
    const Reflection reflection = reflect(column[j], square);
    r_[j * stride_ + j] = reflection.pivot;
    column[j] = reflection.top;
    tile.factors[j] = reflection.factor;
    double* const others = column + tile.stride + from;
    const std::size_t left = columns_ - j - 1;
    loops_.dots(column + from, others, tile.stride, left, end - from, by_.data());
    for (std::size_t c = 0; c < left; ++c) {
      by_[c] *= -reflection.factor;
    }
    loops_.add_multiples(column + from, by_.data(), others, tile.stride, left, end - from);
  }
}

void TiledQr::reduce(Tile& tile) {
  const std::size_t end = padded(tile.rows);
  for (std::size_t j = 0; j < height_; ++j) {
    double* const column = tile.vectors.data() + j * tile.stride;
    double* const row = r_.data() + j * stride_;
    const double square = loops_.dot(column, column, end);
    if (square < kNegligible) {
      std::fill_n(column, end, 0.0);
      continue;
    }
    const Reflection reflection = reflect(row[j], row[j] * row[j] + square);
    row[j] = reflection.pivot;
    tile.tops[j] = reflection.top;
    tile.factors[j] = reflection.factor;
    const std::size_t left = columns_ - j - 1;
    loops_.dots(column, column + tile.stride, tile.stride, left, end, by_.data());
    for (std::size_t c = 0; c < left; ++c) {
      double& above = row[j + 1 + c];
      by_[c] = -reflection.factor * (by_[c] + reflection.top * above);
      above += by_[c] * reflection.top;
    }
    loops_.add_multiples(column, by_.data(), column + tile.stride, tile.stride, left, end);
  }
}

void TiledQr::apply(std::vector<double> top, std::size_t columns, std::size_t stride,
                    const Take& take) const {
  std::vector<double> out, by(columns);
  for (std::size_t t = tiles_.size(); t-- > 0;) {
    const Tile& tile = tiles_[t];
    const std::size_t end = padded(tile.rows);
    out.assign(columns * tile.stride, 0.0);
    for (std::size_t i = 0; t == 0 && i < height_; ++i) {
      for (std::size_t c = 0; c < columns; ++c) {
        out[c * tile.stride + i] = top[i * stride + c];
      }
    }
    for (std::size_t j = height_; j-- > 0;) {
      if (tile.factors[j] == 0) {
        continue;
      }
      const std::size_t from = t == 0 ? j / kLanes * kLanes : 0;
      const double* const vector = tile.vectors.data() + j * tile.stride + from;
      loops_.dots(vector, out.data() + from, tile.stride, columns, end - from, by.data());
      for (std::size_t c = 0; c < columns; ++c) {
        double& above = top[j * stride + c];
        by[c] = -tile.factors[j] * (by[c] + tile.tops[j] * above);
        above += by[c] * tile.tops[j];  // tops are 0 in the first tile
      }
      loops_.add_multiples(vector, by.data(), out.data() + from, tile.stride, columns, end - from);
    }
    take(tile.first, tile.rows, out.data(), tile.stride);
  }
}

SideQr::SideQr(const Stack& stack, Side side, bool keep, Workers* workers)
    : workers_(workers), block_rows_(std::max(kBlockRows, stack.columns())) {
  const std::uint64_t rows = stack.length(side);
  const std::size_t columns = stack.columns();
  blocks_.resize(static_cast<std::size_t>((rows + block_rows_ - 1) / block_rows_));
  run_parts(workers, blocks_.size(), [&](std::size_t i) {
    const std::uint64_t begin = i * block_rows_;
    const auto read = [&](std::uint64_t first, std::size_t count, double* to, std::size_t stride) {
      stack.read(side, begin + first, count, to, stride);
    };
    blocks_[i] =
        std::make_unique<TiledQr>(read, std::min(block_rows_, rows - begin), columns, keep);
  });
  if (blocks_.size() == 1) {
    return;
  }
  std::vector<const double*> below;  // the rows of all triangles
  for (const auto& block : blocks_) {
    for (std::size_t i = 0; i < block->height(); ++i) {
      below.push_back(block->row(i));
    }
  }
  const auto read = [&](std::uint64_t first, std::size_t count, double* to, std::size_t stride) {
    for (std::size_t i = 0; i < count; ++i) {
      for (std::size_t c = 0; c < columns; ++c) {
        to[c * stride + i] = below[first + i][c];
      }
    }
  };
  top_ = std::make_unique<TiledQr>(read, below.size(), columns, keep);
}

void SideQr::apply(std::vector<double> top, std::size_t columns, std::size_t stride,
                   const TiledQr::Take& take) const {
  if (!top_) {
    blocks_[0]->apply(std::move(top), columns, stride, take);
    return;
  }
  std::vector<double> tops;  // of all blocks, row after row
  for (const auto& block : blocks_) {
    tops.resize(tops.size() + block->height() * stride);
  }
  top_->apply(std::move(top), columns, stride,
              [&](std::uint64_t first, std::size_t rows, const double* of, std::size_t apart) {
                for (std::size_t i = 0; i < rows; ++i) {
                  for (std::size_t c = 0; c < columns; ++c) {
                    tops[(first + i) * stride + c] = of[c * apart + i];
                  }
                }
              });
  run_parts(workers_, blocks_.size(), [&](std::size_t i) {
    std::size_t above = 0;
    for (std::size_t before = 0; before < i; ++before) {
      above += blocks_[before]->height();
    }
    const auto from = tops.begin() + static_cast<std::ptrdiff_t>(above * stride);
    const auto end = from + static_cast<std::ptrdiff_t>(blocks_[i]->height() * stride);
    blocks_[i]->apply({from, end}, columns, stride,
                      [&](std::uint64_t first, std::size_t rows, const double* of,
                          std::size_t apart) { take(i * block_rows_ + first, rows, of, apart); });
  });
}

}  // namespace fedcore::factors
