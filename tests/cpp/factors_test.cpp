// Sums of products of factors under the sanitizers: each instruction set and any threads give the same bits, reads
// stay within the factors, and what is not finite is refused.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/workers.hpp"
#include "check.hpp"
#include "factors/figure.hpp"
#include "factors/merge.hpp"
#include "kernels/kernels.hpp"

using namespace fedcore;
using namespace fedcore::factors;

namespace {

Reader reader_of(std::vector<double> values) {
  const auto held = std::make_shared<const std::vector<double>>(std::move(values));
  return [held](std::uint64_t first, std::size_t count, double* to) {
    CHECK(first + count <= held->size());
    std::copy_n(held->begin() + static_cast<std::ptrdiff_t>(first), count, to);
  };
}

struct Made {
  std::vector<Term> terms;
  std::vector<double> whole;  // row after row
};

Made random_terms(Shape shape, const std::vector<std::size_t>& ranks) {
  std::mt19937_64 random(shape.rows + 7 * shape.columns);
  std::normal_distribution<double> normal;
  Made made{{}, std::vector<double>(shape.rows * shape.columns)};
  for (const std::size_t rank : ranks) {
    std::vector<double> b(shape.rows * rank), a(rank * shape.columns);
    std::generate(b.begin(), b.end(), [&] { return normal(random); });
    std::generate(a.begin(), a.end(), [&] { return normal(random); });
    const double scale = 1.0 + static_cast<double>(made.terms.size());
    for (std::size_t i = 0; i < shape.rows; ++i) {
      for (std::size_t r = 0; r < rank; ++r) {
        for (std::size_t j = 0; j < shape.columns; ++j) {
          made.whole[i * shape.columns + j] += scale * b[i * rank + r] * a[r * shape.columns + j];
        }
      }
    }
    made.terms.push_back({scale, rank, reader_of(std::move(b)), reader_of(std::move(a))});
  }
  return made;
}

// How far B * A is from a whole matrix, at most.
double distance(Shape shape, const Factors& of, const std::vector<double>& whole) {
  double most = 0;
  for (std::size_t i = 0; i < shape.rows; ++i) {
    for (std::size_t j = 0; j < shape.columns; ++j) {
      double sum = 0;
      for (std::size_t r = 0; r < of.rank; ++r) {
        sum += of.b[i * of.rank + r] * of.a[r * shape.columns + j];
      }
      most = std::max(most, std::abs(sum - whole[i * shape.columns + j]));
    }
  }
  return most;
}

void the_product_of_full_rank_is_the_sum_with_the_same_bits_everywhere() {
  Workers workers(3);
  const std::vector<std::size_t> few = {3, 5}, many = {7, 1, 130, 140};
  for (const Shape shape : {Shape{1, 1}, Shape{9, 33}, Shape{60, 47}, Shape{2100, 5}}) {
    for (const std::vector<std::size_t>& ranks : {few, shape.rows == 60 ? many : few}) {
      const Made made = random_terms(shape, ranks);
      const std::size_t full = 64;
      Factors first{};
      Figure figure_of_first{};
      for (const std::string& level : kernels::available()) {
        kernels::select(level);
        for (Workers* const with : {static_cast<Workers*>(nullptr), &workers}) {
          const Factors found = merge(shape, made.terms, full, 1, with);
          const Figure figure_of = figure(shape, made.terms, &made.terms[0], with);
          if (first.b.empty()) {
            first = found;
            figure_of_first = figure_of;
          }
          CHECK(found.b == first.b && found.a == first.a && found.sigma == first.sigma);
          CHECK(std::memcmp(&figure_of, &figure_of_first, sizeof(Figure)) == 0);
        }
      }
      CHECK(distance(shape, first, made.whole) <= 1e-10 * (1 + first.norm));
    }
  }
}

void what_is_not_finite_is_refused_and_what_is_zero_is_zero() {
  const Shape shape{4, 6};
  for (const double bad : {std::numeric_limits<double>::infinity(), std::nan("")}) {
    Made made = random_terms(shape, {2, 2});
    std::vector<double> values(12, 1.0);
    values[5] = bad;
    made.terms[1].a = reader_of(values);
    try {
      merge(shape, made.terms, 2);
      CHECK(false);
    } catch (const Error& error) {
      CHECK(error.code() == Errc::kNonFinite);
    }
  }
  const std::vector<Term> zero = {
      {1, 2, reader_of(std::vector<double>(8)), reader_of(std::vector<double>(12, 1.0))}};
  const Factors found = merge(shape, zero, 3);
  CHECK(found.kept == 0 && found.norm == 0);
  CHECK(std::all_of(found.b.begin(), found.b.end(), [](double value) { return value == 0; }));
}

}  // namespace

int main() {
  the_product_of_full_rank_is_the_sum_with_the_same_bits_everywhere();
  what_is_not_finite_is_refused_and_what_is_zero_is_zero();
  return 0;
}
