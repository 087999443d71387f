#include "factors/jacobi.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "factors/loops.hpp"

namespace fedcore::factors {
namespace {

constexpr int kMostSweeps = 60;
// What is smaller than this beside the largest is noise, and left out.
constexpr double kNoise = 0x1p-56;
constexpr double kRounding = 0x1p-52;

// The triangle of a pivoted QR factorisation: its rows, in the order of the matrix's own columns.
Columns triangle_rows(const Loops& with, Columns& matrix) {
  const std::size_t n = matrix.columns, end = padded(matrix.rows);
  const auto column = [&](std::size_t c) { return matrix.values.data() + c * matrix.stride; };
  std::vector<std::size_t> origin(n);
  std::iota(origin.begin(), origin.end(), std::size_t{0});
  std::vector<double> by(n);
  Columns out{n, 0, padded(n), {}};
  double most = 0;
  for (std::size_t j = 0; j < std::min(matrix.rows, n); ++j) {
    const std::size_t from = j / kLanes * kLanes;
    std::size_t best = j;
    double square = -1;
    for (std::size_t c = j; c < n; ++c) {
      const double of = with.dot(column(c) + from, column(c) + from, end - from);
      if (of > square) {
        square = of;
        best = c;
      }
    }
    most = j == 0 ? square : most;
    if (!(square > kNoise * kNoise * most)) {
      break;
    }
    std::swap_ranges(column(j), column(j) + end, column(best));
    std::swap(origin[j], origin[best]);
    out.values.resize((j + 1) * out.stride);
    double* const row = out.values.data() + j * out.stride;
    const double norm = std::sqrt(square), pivot = column(j)[j];
    const double to = pivot >= 0 ? -norm : norm;
    column(j)[j] = pivot - to;
    row[origin[j]] = to;
    const std::size_t left = n - j - 1;
    with.dots(column(j) + from, column(j) + matrix.stride + from, matrix.stride, left, end - from,
              by.data());
    for (std::size_t c = 0; c < left; ++c) {
      by[c] *= -1 / (norm * (norm + std::abs(pivot)));
    }
    with.add_multiples(column(j) + from, by.data(), column(j) + matrix.stride + from, matrix.stride,
                       left, end - from);
    for (std::size_t c = j + 1; c < n; ++c) {  // later sums start at a multiple of kLanes
      row[origin[c]] = std::exchange(column(c)[j], 0.0);
    }
    ++out.columns;
  }
  return out;
}

// Makes two columns orthogonal, unless they are. `squares`: their squared norms.
bool make_orthogonal(const Loops& with, double* one, double* other, double& square, double& square2,
                     std::size_t count, double limit) {
  const double product = with.dot(one, other, count);
  if (!(product * product > limit * square * square2)) {
    return false;
  }
  const double zeta = (square2 - square) / (2 * product);
  const double root = std::sqrt(1 + zeta * zeta);
  const double tangent = zeta >= 0 ? 1 / (zeta + root) : -1 / (root - zeta);
  const double c = 1 / std::sqrt(1 + tangent * tangent);
  with.rotate(one, other, c, c * tangent, count);
  square = with.dot(one, one, count);
  square2 = with.dot(other, other, count);
  return true;
}

}  // namespace

RightVectors right_vectors(Columns matrix) {
  const Loops& with = loops();
  Columns x = triangle_rows(with, matrix);
  const std::size_t count = padded(x.rows);
  const auto column = [&](std::size_t i) { return x.values.data() + i * x.stride; };
  std::vector<double> squares(x.columns);
  for (std::size_t i = 0; i < x.columns; ++i) {
    squares[i] = with.dot(column(i), column(i), count);
  }
  const double limit = kRounding * kRounding * static_cast<double>(x.rows);
  bool turned = true;
  for (int sweep = 0; turned && sweep < kMostSweeps; ++sweep) {
    turned = false;
    for (std::size_t i = 0; i + 1 < x.columns; ++i) {
      for (std::size_t j = i + 1; j < x.columns; ++j) {
        turned |= make_orthogonal(with, column(i), column(j), squares[i], squares[j], count, limit);
      }
    }
  }
  std::vector<std::size_t> order(x.columns);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t i, std::size_t j) { return squares[i] > squares[j]; });
  RightVectors out{{}, x.stride, {}};
  const double least = kRounding * static_cast<double>(std::max(matrix.rows, matrix.columns));
  for (const std::size_t i : order) {
    const double sigma = std::sqrt(squares[i]);
    if (!out.sigma.empty() && sigma <= least * out.sigma[0]) {
      break;
    }
    out.sigma.push_back(sigma);
    for (std::size_t e = 0; e < x.stride; ++e) {
      out.vectors.push_back(column(i)[e] / sigma);
    }
  }
  return out;
}

}  // namespace fedcore::factors
