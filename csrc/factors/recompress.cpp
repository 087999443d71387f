#include "factors/recompress.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.hpp"
#include "factors/jacobi.hpp"
#include "factors/loops.hpp"
#include "factors/qr.hpp"

namespace fedcore::factors {
namespace {

constexpr std::size_t kFewRows = 64;  // that many rows of the result fit the first-level cache

// The right side's triangle times the transposed left one's, as the columns of left * right.
Columns core_of(const TiledQr& left, const TiledQr& right) {
  const Loops& with = loops();
  Columns core{left.height(), right.height(), padded(left.height()), {}};
  core.values.resize(core.columns * core.stride);
  for (std::size_t c = 0; c < core.columns; ++c) {
    with.dots(right.row(c), left.row(0), left.stride(), core.rows, right.stride(),
              core.values.data() + c * core.stride);
  }
  return core;
}

// Of vectors one after the other, those up to `rank`, side by side.
std::vector<double> beside(const RightVectors& of, std::size_t length, std::size_t rank,
                           std::size_t stride) {
  std::vector<double> out(length * stride);
  for (std::size_t j = 0; j < rank; ++j) {
    for (std::size_t i = 0; i < length; ++i) {
      out[i * stride + j] = of.vectors[j * of.stride + i];
    }
  }
  return out;
}

// B = left side * by, where `by` has a row of `stride` numbers for each column of the stack.
void multiply(const Stack& stack, const std::vector<double>& by, std::size_t stride,
              std::size_t rank, Factors& into, Workers* workers) {
  const Loops& with = loops();
  const std::uint64_t rows = stack.length(Side::kLeft);
  const std::size_t apart = tile_stride(kTileRows);
  const auto tiles = static_cast<std::size_t>((rows + kTileRows - 1) / kTileRows);
  run_parts(workers, tiles, [&](std::size_t t) {
    const std::uint64_t first = t * kTileRows;
    std::vector<double> tile(stack.columns() * apart), out(rank * apart);
    const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(kTileRows, rows - first));
    stack.read(Side::kLeft, first, n, tile.data(), apart);
    for (std::size_t row = 0; row < n; row += kFewRows) {
      for (std::size_t i = 0; i < stack.columns(); ++i) {
        with.add_multiples(tile.data() + i * apart + row, by.data() + i * stride, out.data() + row,
                           apart, rank, kFewRows);
      }
    }
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < rank; ++j) {
        into.b[(first + i) * into.rank + j] = out[j * apart + i];
      }
    }
  });
}

double norm_of(const std::vector<double>& sigma, std::size_t from) {
  double sum = 0;
  for (std::size_t i = sigma.size(); i > from; --i) {  // the smallest first
    sum += sigma[i - 1] * sigma[i - 1];
  }
  return std::sqrt(sum);
}

// Turns a pair of a column and a row round where the row's entry of largest magnitude is negative.
void fix_signs(Shape shape, Factors& of) {
  for (std::size_t j = 0; j < of.kept; ++j) {
    double* const row = of.a.data() + j * shape.columns;
    const double largest =
        *std::max_element(row, row + shape.columns,
                          [](double one, double other) { return std::abs(one) < std::abs(other); });
    if (largest < 0) {
      std::transform(row, row + shape.columns, row, [](double value) { return -value; });
      for (std::uint64_t i = 0; i < shape.rows; ++i) {
        of.b[i * of.rank + j] = -of.b[i * of.rank + j];
      }
    }
  }
}

// Brings what was computed to the size of the sum.
void rescale(Factors& of, int exponent, double divisor) {
  const auto bring = [&](double& value) {
    value = scaled(value / divisor, exponent);
    if (!std::isfinite(value)) {
      throw Error(Errc::kNonFinite, "the sum of the products is too large");
    }
  };
  std::for_each(of.b.begin(), of.b.end(), bring);
  std::for_each(of.sigma.begin(), of.sigma.end(), bring);
  bring(of.norm);
  bring(of.cut);
}

}  // namespace

Factors recompress(Shape shape, const std::vector<Term>& terms, std::size_t most, double divisor,
                   Workers* workers) {
  const auto rank =
      static_cast<std::size_t>(std::min<std::uint64_t>({most, shape.rows, shape.columns}));
  Factors out{rank,
              std::vector<double>(shape.rows * rank),
              std::vector<double>(rank * shape.columns),
              std::vector<double>(rank),
              0,
              0,
              0};
  const Stack stack(shape, terms);
  if (stack.columns() == 0) {
    return out;
  }
  const SideQr right_side(stack, Side::kRight, true, workers);
  const TiledQr& right = right_side.triangle();
  const SideQr left_side(stack, Side::kLeft, false, workers);
  const RightVectors of = right_vectors(core_of(left_side.triangle(), right));
  out.norm = norm_of(of.sigma, 0);
  out.cut = norm_of(of.sigma, rank);
  out.kept = std::min(rank, of.sigma.size());
  std::copy_n(of.sigma.begin(), out.kept, out.sigma.begin());
  const std::size_t stride = padded(out.kept);
  std::vector<double> vectors = beside(of, right.height(), out.kept, stride);
  std::vector<double> by(stack.columns() * stride);
  for (std::size_t i = 0; i < right.height(); ++i) {
    loops().add_multiples(vectors.data() + i * stride, right.row(i), by.data(), stride,
                          stack.columns(), stride);
  }
  right_side.apply(
      std::move(vectors), out.kept, stride,
      [&](std::uint64_t first, std::size_t rows, const double* columns, std::size_t apart) {
        for (std::size_t j = 0; j < out.kept; ++j) {
          std::copy_n(columns + j * apart, rows, out.a.data() + j * shape.columns + first);
        }
      });
  multiply(stack, by, stride, out.kept, out, workers);
  fix_signs(shape, out);
  rescale(out, stack.exponent(), divisor);
  return out;
}

std::size_t recompress_scratch(Shape shape, std::size_t columns, std::size_t most,
                               unsigned threads) noexcept {
  const auto rank =
      static_cast<std::size_t>(std::min<std::uint64_t>({most, shape.rows, shape.columns}));
  const std::size_t stride = tile_stride(std::max(kTileRows, columns));
  const auto rows = static_cast<std::size_t>(shape.columns);
  const std::size_t kept = columns * (rows + (rows / kTileRows + 2) * 2 * kLanes);
  const std::size_t blocks =
      static_cast<std::size_t>(shape.rows + shape.columns) / std::max(kBlockRows, columns) + 2;
  const std::size_t triangles = (3 * blocks + 6) * padded(columns) * padded(columns);
  return (kept + threads * (columns + rank) * stride + triangles) * sizeof(double);
}

}  // namespace fedcore::factors
