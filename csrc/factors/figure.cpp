#include "factors/figure.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "base/error.hpp"
#include "factors/loops.hpp"
#include "factors/qr.hpp"

namespace fedcore::factors {
namespace {

constexpr std::size_t kBlock = 256;  // columns

// A column of the stack: of a term's differences, of the mean, or of the base.
struct Column {
  enum class Of : std::uint8_t { kTerm, kMean, kBase } of;
  std::size_t term, place;
};

std::vector<Column> columns_of(const std::vector<Term>& terms, std::size_t most, const Term* base) {
  std::vector<Column> columns;
  for (std::size_t k = 0; k < terms.size(); ++k) {
    for (std::size_t place = 0; place < terms[k].rank; ++place) {
      columns.push_back({Column::Of::kTerm, k, place});
    }
  }
  for (std::size_t place = 0; place < most; ++place) {
    columns.push_back({Column::Of::kMean, 0, place});
  }
  for (std::size_t place = 0; base != nullptr && place < base->rank; ++place) {
    columns.push_back({Column::Of::kBase, 0, place});
  }
  return columns;
}

// The columns of one side, brought to a magnitude of about 1 by one power of two, and their mean.
class SideColumns {
 public:
  SideColumns(Shape shape, Side side, const std::vector<Term>& terms, std::size_t most,
              const Term* base)
      : length_(side == Side::kLeft ? shape.rows : shape.columns),
        side_(side),
        terms_(terms),
        base_(base) {
    double largest = 0;
    for (std::size_t k = 0; k < terms.size(); ++k) {
      largest = std::max(largest, largest_of(terms[k], "term " + std::to_string(k)));
    }
    if (base != nullptr) {
      largest = std::max(largest, largest_of(*base, "the base"));
    }
    std::frexp(largest, &exponent_);
    halves_ = {std::ldexp(1.0, -exponent_ / 2), std::ldexp(1.0, -exponent_ - -exponent_ / 2)};
    add_up(most);
  }

  int exponent() const noexcept { return exponent_; }
  std::uint64_t length() const noexcept { return length_; }

  // `count` numbers from `first` on of columns begin to end: columns of `to`, `stride` apart.
  void read(const Column* begin, const Column* end, std::uint64_t first, std::size_t count,
            double* to, std::size_t stride) const {
    std::vector<double> rows;
    const Term* held = nullptr;  // the term whose rows of B these are
    for (const Column* column = begin; column != end; ++column, to += stride) {
      const double* const mean = column->of == Column::Of::kBase
                                     ? nullptr
                                     : mean_.data() + column->place * length_ + first;
      if (column->of == Column::Of::kMean) {
        std::copy_n(mean, count, to);
        continue;
      }
      const bool differs = column->of == Column::Of::kTerm;
      const Term& term = differs ? terms_[column->term] : *base_;
      if (held != &term) {
        held = &term;
        read_rows(term, first, count, rows);
      }
      read_column(term, column->place, first, count, rows, to);
      for (std::size_t i = 0; i < count && differs; ++i) {
        to[i] -= mean[i];
      }
    }
  }

 private:
  const Reader& reader(const Term& term) const noexcept {
    return side_ == Side::kLeft ? term.b : term.a;
  }

  double largest_of(const Term& term, const std::string& name) const {
    constexpr std::size_t kRead = 4096;
    std::vector<double> values(kRead);
    double most = 0;
    const std::uint64_t size = length_ * term.rank;
    for (std::uint64_t first = 0; first < size; first += kRead) {
      const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(kRead, size - first));
      reader(term)(first, n, values.data());
      for (std::size_t i = 0; i < n; ++i) {
        if (!std::isfinite(values[i])) {
          throw Error(Errc::kNonFinite, std::string("NaN or infinity in ") +
                                            (side_ == Side::kLeft ? "B" : "A") + " of " + name);
        }
        most = std::max(most, std::abs(values[i]));
      }
    }
    return most;
  }

  // Of a left side, the rows of which read_column() takes columns.
  void read_rows(const Term& term, std::uint64_t first, std::size_t count,
                 std::vector<double>& rows) const {
    if (side_ == Side::kLeft) {
      rows.resize(count * term.rank);
      term.b(first * term.rank, rows.size(), rows.data());
    }
  }

  void read_column(const Term& term, std::size_t place, std::uint64_t first, std::size_t count,
                   const std::vector<double>& rows, double* to) const {
    if (side_ == Side::kRight) {
      term.a(place * length_ + first, count, to);
    }
    for (std::size_t i = 0; i < count; ++i) {
      const double value = side_ == Side::kLeft ? rows[i * term.rank + place] : to[i];
      to[i] = value * halves_[0] * halves_[1];
    }
  }

  void add_up(std::size_t most) {
    double total = 0;
    for (const Term& term : terms_) {
      total += term.scale;
    }
    mean_.assign(most * length_, 0.0);
    std::vector<double> rows, values(kTileRows);
    for (const Term& term : terms_) {
      for (std::uint64_t first = 0; first < length_; first += kTileRows) {
        const auto n =
            static_cast<std::size_t>(std::min<std::uint64_t>(kTileRows, length_ - first));
        read_rows(term, first, n, rows);
        for (std::size_t place = 0; place < term.rank; ++place) {
          read_column(term, place, first, n, rows, values.data());
          double* const mean = mean_.data() + place * length_ + first;
          for (std::size_t i = 0; i < n; ++i) {
            mean[i] += term.scale / total * values[i];
          }
        }
      }
    }
  }

  std::uint64_t length_;
  Side side_;
  const std::vector<Term>& terms_;
  const Term* base_;
  int exponent_ = 0;
  std::array<double, 2> halves_{};  // of what to scale by, so that none overflows
  std::vector<double> mean_;        // column after column
};

// Columns first to first + count of a stack.
struct Block {
  std::size_t first, count;
};

// The products of each column of one block and each of the other; of the same block, those of a column
// and the ones from it on.
std::vector<double> products(const SideColumns& side, const Column* columns, Block one,
                             Block other) {
  const std::size_t apart = tile_stride(kTileRows);
  const bool same = one.first == other.first;
  std::vector<double> left(one.count * apart), right(other.count * apart);
  std::vector<double> sums(one.count * other.count), row(other.count);
  const auto read = [&](Block block, std::uint64_t first, std::size_t rows,
                        std::vector<double>& to) {
    if (rows < kTileRows) {
      std::fill(to.begin(), to.end(), 0.0);
    }
    const Column* const begin = columns + block.first;
    side.read(begin, begin + block.count, first, rows, to.data(), apart);
  };
  for (std::uint64_t first = 0; first < side.length(); first += kTileRows) {
    const auto rows =
        static_cast<std::size_t>(std::min<std::uint64_t>(kTileRows, side.length() - first));
    read(one, first, rows, left);
    if (!same) {
      read(other, first, rows, right);
    }
    for (std::size_t i = 0; i < one.count; ++i) {
      const std::size_t from = same ? i : 0;
      loops().dots(left.data() + i * apart, (same ? left : right).data() + from * apart, apart,
                   other.count - from, padded(rows), row.data());
      for (std::size_t j = from; j < other.count; ++j) {
        sums[i * other.count + j] += row[j - from];
      }
    }
  }
  return sums;
}

// What each column counts for in the error, in the sum and in the change.
constexpr std::size_t kNorms = 3;
using Counts = std::array<std::vector<double>, kNorms>;
using Squares = std::array<double, kNorms>;

Counts counts_of(const std::vector<Term>& terms, double total, std::size_t most, const Term* base) {
  std::vector<double> counts;
  for (const Term& term : terms) {
    counts.insert(counts.end(), term.rank, term.scale / total);
  }
  const std::size_t differences = counts.size();
  for (std::size_t place = 0; place < most; ++place) {
    double filled = 0;  // where a term is filled up, it differs from the mean by all of that
    for (const Term& term : terms) {
      filled += term.rank <= place ? term.scale / total : 0;
    }
    counts.push_back(filled);
  }
  counts.resize(counts.size() + (base != nullptr ? base->rank : 0));
  Counts all{counts, counts, counts};
  for (std::size_t place = 0; place < most; ++place) {
    all[1][differences + place] += 1;
    all[2][differences + place] += 1;
  }
  for (std::size_t place = differences + most; place < counts.size(); ++place) {
    all[2][place] = -base->scale;
  }
  return all;
}

// What two blocks add to the squares of the norms.
Squares squares_of(const std::vector<double>& left, const std::vector<double>& right, Block one,
                   Block other, const Counts& counts) {
  const bool same = one.first == other.first;
  Squares squares{};
  for (std::size_t norm = 0; norm < kNorms; ++norm) {
    for (std::size_t i = 0; i < one.count; ++i) {
      for (std::size_t j = same ? i : 0; j < other.count; ++j) {
        const std::size_t at = i * other.count + j;
        const double product =
            left[at] * right[at] * counts[norm][one.first + i] * counts[norm][other.first + j];
        squares[norm] += same && i == j ? product : 2 * product;
      }
    }
  }
  return squares;
}

}  // namespace

Figure figure(Shape shape, const std::vector<Term>& terms, const Term* base, Workers* workers) {
  double total = 0;
  std::size_t most = 0;
  for (const Term& term : terms) {
    if (!(term.scale > 0) || !std::isfinite(term.scale)) {
      throw Error(Errc::kConfig, "a weight of the figure must be a positive number");
    }
    total += term.scale;
    most = std::max(most, term.rank);
  }
  if (terms.empty()) {
    throw Error(Errc::kConfig, "a figure needs at least one term");
  }
  const SideColumns left(shape, Side::kLeft, terms, most, base);
  const SideColumns right(shape, Side::kRight, terms, most, base);
  const std::vector<Column> columns = columns_of(terms, most, base);
  const Counts counts = counts_of(terms, total, most, base);
  std::vector<std::pair<Block, Block>> pairs;
  const auto block_at = [&](std::size_t first) {
    return Block{first, std::min(kBlock, columns.size() - first)};
  };
  for (std::size_t i = 0; i < columns.size(); i += kBlock) {
    for (std::size_t j = i; j < columns.size(); j += kBlock) {
      pairs.emplace_back(block_at(i), block_at(j));
    }
  }
  std::vector<Squares> squares(pairs.size());
  run_parts(workers, pairs.size(), [&](std::size_t p) {
    const auto& [one, other] = pairs[p];
    squares[p] = squares_of(products(left, columns.data(), one, other),
                            products(right, columns.data(), one, other), one, other, counts);
  });
  Squares all{};
  for (const Squares& of : squares) {
    for (std::size_t norm = 0; norm < kNorms; ++norm) {
      all[norm] += of[norm];
    }
  }
  const int exponent = left.exponent() + right.exponent();
  const auto norm_of = [&](double square) {
    return scaled(square > 0 ? std::sqrt(square) : 0, exponent);
  };
  return {norm_of(all[1]), norm_of(all[0]), norm_of(all[2])};
}

std::size_t figure_scratch(Shape shape, std::size_t most, unsigned threads) noexcept {
  const auto sides = static_cast<std::size_t>(shape.rows + shape.columns);
  const std::size_t of_thread =
      2 * kBlock * (tile_stride(kTileRows) + kBlock) + most * kTileRows + kBlock;
  return (most * sides + threads * of_thread) * sizeof(double);
}

}  // namespace fedcore::factors
