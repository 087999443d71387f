#include "factors/stack.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/error.hpp"

namespace fedcore::factors {
namespace {

constexpr std::size_t kRead = 4096;  // numbers at a time

double power_of_two(int exponent) noexcept { return std::ldexp(1.0, exponent); }

struct Factor {
  const Reader& read;
  std::uint64_t count;
  std::size_t rank;
  bool by_rows;  // a column of the stack is a row of the factor
};

// The largest magnitude of each column of the stack that a factor holds.
std::vector<double> largest(const Factor& factor, const std::string& name) {
  std::vector<double> most(factor.rank, 0.0);
  std::vector<double> values(kRead);
  const std::uint64_t row = factor.count / factor.rank;
  for (std::uint64_t first = 0; first < factor.count; first += kRead) {
    const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(kRead, factor.count - first));
    factor.read(first, n, values.data());
    for (std::size_t i = 0; i < n; ++i) {
      if (!std::isfinite(values[i])) {
        throw Error(Errc::kNonFinite, "NaN or infinity in " + name);
      }
      const std::uint64_t element = first + i;
      const std::uint64_t place = factor.by_rows ? element / row : element % factor.rank;
      double& of = most[static_cast<std::size_t>(place)];
      of = std::max(of, std::abs(values[i]));
    }
  }
  return most;
}

int exponent_of(double value) noexcept {
  int exponent = 0;
  std::frexp(value, &exponent);
  return exponent;
}

}  // namespace

double scaled(double value, int exponent) noexcept {
  const int half = std::clamp(exponent, -2000, 2000) / 2;
  const int rest = std::clamp(exponent, -2000, 2000) - half;
  return value * power_of_two(half) * power_of_two(rest);
}

Stack::Stack(Shape shape, const std::vector<Term>& terms) : shape_(shape), terms_(terms) {
  std::vector<int> totals;
  for (std::size_t k = 0; k < terms.size(); ++k) {
    const Term& term = terms[k];
    const std::string name = " of term " + std::to_string(k);
    if (!std::isfinite(term.scale)) {
      throw Error(Errc::kNonFinite, "the scale" + name + " is NaN or infinity");
    }
    if (term.rank == 0) {
      continue;
    }
    const auto left = largest({term.b, shape.rows * term.rank, term.rank, false}, "B" + name);
    const auto right = largest({term.a, shape.columns * term.rank, term.rank, true}, "A" + name);
    for (std::size_t place = 0; place < term.rank && term.scale != 0; ++place) {
      if (left[place] != 0 && right[place] != 0) {
        const int of_left = exponent_of(left[place]), of_right = exponent_of(right[place]);
        columns_.push_back({k, place, {-of_left, -of_right}});
        totals.push_back(of_left + of_right + exponent_of(term.scale));
      }
    }
  }
  exponent_ = totals.empty() ? 0 : *std::max_element(totals.begin(), totals.end());
  for (std::size_t i = 0; i < columns_.size(); ++i) {
    columns_[i].exponents[0] += totals[i] - exponent_;
  }
}

void Stack::read(Side side, std::uint64_t first, std::size_t count, double* to,
                 std::size_t stride) const {
  std::vector<double> values;
  std::size_t held = terms_.size();  // the term whose rows of B `values` has
  for (std::size_t i = 0; i < columns_.size(); ++i) {
    const Column& column = columns_[i];
    const Term& term = terms_[column.term];
    double* const into = to + i * stride;
    const int half = column.exponents[static_cast<int>(side)] / 2;
    const double one = power_of_two(half);
    const double other = power_of_two(column.exponents[static_cast<int>(side)] - half);
    if (side == Side::kRight) {
      term.a(column.place * shape_.columns + first, count, into);
      for (std::size_t j = 0; j < count; ++j) {
        into[j] = into[j] * one * other;
      }
      continue;
    }
    if (held != column.term) {
      held = column.term;
      values.resize(count * term.rank);
      term.b(first * term.rank, values.size(), values.data());
    }
    int ignored = 0;
    const double part = std::frexp(term.scale, &ignored);
    for (std::size_t j = 0; j < count; ++j) {
      into[j] = values[j * term.rank + column.place] * one * other * part;
    }
  }
}

}  // namespace fedcore::factors
