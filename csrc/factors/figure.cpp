#include "factors/figure.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/error.hpp"
#include "factors/loops.hpp"
#include "factors/qr.hpp"

namespace fedcore::factors {
namespace {

// The columns of the differences of each term, then of the mean, then of the base.
struct Places {
  std::size_t differences = 0, most = 0, base = 0;

  explicit Places(const std::vector<Term>& terms, const Term* of_base) {
    for (const Term& term : terms) {
      differences += term.rank;
      most = std::max(most, term.rank);
    }
    base = of_base != nullptr ? of_base->rank : 0;
  }
  std::size_t all() const noexcept { return differences + most + base; }
};

// The columns of one side, tile after tile, brought to a magnitude of about 1 by one power of two.
class Columns {
 public:
  Columns(Shape shape, Side side, const std::vector<Term>& terms, const Term* base)
      : shape_(shape), side_(side), terms_(terms), base_(base), places_(terms, base) {
    double most = 0;
    for (std::size_t k = 0; k < terms.size(); ++k) {
      total_ += terms[k].scale;
      most = std::max(most, largest(terms[k], "term " + std::to_string(k)));
    }
    if (base != nullptr) {
      most = std::max(most, largest(*base, "the base"));
    }
    std::frexp(most, &exponent_);
  }

  const Places& places() const noexcept { return places_; }
  int exponent() const noexcept { return exponent_; }
  std::uint64_t length() const noexcept {
    return side_ == Side::kLeft ? shape_.rows : shape_.columns;
  }

  void read(std::uint64_t first, std::size_t count, double* to, std::size_t stride) {
    std::size_t column = 0;
    for (const Term& term : terms_) {
      read_term(term, first, count, to + column * stride, stride);
      column += term.rank;
    }
    double* const mean = to + column * stride;
    std::fill_n(mean, places_.most * stride, 0.0);
    column = 0;
    for (const Term& term : terms_) {
      for (std::size_t place = 0; place < term.rank; ++place, ++column) {
        for (std::size_t i = 0; i < count; ++i) {
          mean[place * stride + i] += term.scale / total_ * to[column * stride + i];
        }
      }
    }
    column = 0;
    for (const Term& term : terms_) {
      for (std::size_t place = 0; place < term.rank; ++place, ++column) {
        for (std::size_t i = 0; i < count; ++i) {
          to[column * stride + i] -= mean[place * stride + i];
        }
      }
    }
    if (base_ != nullptr) {
      read_term(*base_, first, count, mean + places_.most * stride, stride);
    }
  }

 private:
  std::uint64_t size(const Term& term) const noexcept { return length() * term.rank; }
  const Reader& reader(const Term& term) const noexcept {
    return side_ == Side::kLeft ? term.b : term.a;
  }

  double largest(const Term& term, const std::string& name) {
    constexpr std::size_t kRead = 4096;
    values_.resize(kRead);
    double most = 0;
    for (std::uint64_t first = 0; first < size(term); first += kRead) {
      const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(kRead, size(term) - first));
      reader(term)(first, n, values_.data());
      for (std::size_t i = 0; i < n; ++i) {
        if (!std::isfinite(values_[i])) {
          throw Error(Errc::kNonFinite, std::string("NaN or infinity in ") +
                                            (side_ == Side::kLeft ? "B" : "A") + " of " + name);
        }
        most = std::max(most, std::abs(values_[i]));
      }
    }
    return most;
  }

  void read_term(const Term& term, std::uint64_t first, std::size_t count, double* to,
                 std::size_t stride) {
    values_.resize(count * term.rank);
    if (side_ == Side::kLeft) {
      term.b(first * term.rank, values_.size(), values_.data());
    }
    for (std::size_t place = 0; place < term.rank; ++place) {
      double* const into = to + place * stride;
      if (side_ == Side::kRight) {
        term.a(place * shape_.columns + first, count, into);
      }
      for (std::size_t i = 0; i < count; ++i) {
        const double value = side_ == Side::kLeft ? values_[i * term.rank + place] : into[i];
        into[i] = scaled(value, -exponent_);
      }
    }
  }

  Shape shape_;
  Side side_;
  const std::vector<Term>& terms_;
  const Term* base_;
  Places places_;
  double total_ = 0;
  int exponent_ = 0;
  std::vector<double> values_;
};

// The products of each two columns of a side: those of a column with the ones from it on.
std::vector<double> gram(Columns& side) {
  const std::size_t n = side.places().all(), apart = tile_stride(kTileRows);
  std::vector<double> tile(n * apart), sums(n * n), products(n);
  for (std::uint64_t first = 0; first < side.length(); first += kTileRows) {
    const auto rows =
        static_cast<std::size_t>(std::min<std::uint64_t>(kTileRows, side.length() - first));
    if (rows < kTileRows) {
      std::fill(tile.begin(), tile.end(), 0.0);
    }
    side.read(first, rows, tile.data(), apart);
    for (std::size_t i = 0; i < n; ++i) {
      loops().dots(tile.data() + i * apart, tile.data() + i * apart, apart, n - i, padded(rows),
                   products.data());
      for (std::size_t j = i; j < n; ++j) {
        sums[i * n + j] += products[j - i];
      }
    }
  }
  return sums;
}

// What each column of the stack counts for in a sum: of the differences, the means and the base.
double norm_of(const std::vector<double>& left, const std::vector<double>& right,
               const std::vector<double>& counts) {
  const std::size_t n = counts.size();
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = i; j < n; ++j) {
      const double product = left[i * n + j] * right[i * n + j] * counts[i] * counts[j];
      sum += i == j ? product : 2 * product;
    }
  }
  return sum > 0 ? std::sqrt(sum) : 0;
}

}  // namespace

Figure figure(Shape shape, const std::vector<Term>& terms, const Term* base) {
  double total = 0;
  for (const Term& term : terms) {
    if (!(term.scale > 0) || !std::isfinite(term.scale)) {
      throw Error(Errc::kConfig, "a weight of the figure must be a positive number");
    }
    total += term.scale;
  }
  if (terms.empty()) {
    throw Error(Errc::kConfig, "a figure needs at least one term");
  }
  Columns left(shape, Side::kLeft, terms, base), right(shape, Side::kRight, terms, base);
  const std::vector<double> of_left = gram(left), of_right = gram(right);
  const Places& places = left.places();
  std::vector<double> counts;
  for (const Term& term : terms) {
    counts.insert(counts.end(), term.rank, term.scale / total);
  }
  counts.resize(places.all(), 0.0);
  double* const of_means = counts.data() + places.differences;
  for (std::size_t place = 0; place < places.most; ++place) {
    for (const Term& term :
         terms) {  // where it is filled up, it differs from the mean by all of that
      of_means[place] += term.rank <= place ? term.scale / total : 0;
    }
  }
  const int exponent = left.exponent() + right.exponent();
  Figure out{};
  out.error = scaled(norm_of(of_left, of_right, counts), exponent);
  for (std::size_t place = 0; place < places.most; ++place) {
    of_means[place] += 1;
  }
  out.sum = scaled(norm_of(of_left, of_right, counts), exponent);
  if (base != nullptr) {
    std::fill_n(of_means + places.most, places.base, -base->scale);
  }
  out.change = scaled(norm_of(of_left, of_right, counts), exponent);
  return out;
}

std::size_t figure_scratch(std::size_t columns, std::size_t most) noexcept {
  const std::size_t n = columns + most;
  return (n * tile_stride(kTileRows) + 2 * n * n) * sizeof(double);
}

}  // namespace fedcore::factors
