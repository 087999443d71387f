#include "factors/merge.hpp"

#include <algorithm>
#include <memory>
#include <span>
#include <utility>

namespace fedcore::factors {
namespace {

std::size_t columns_of(std::span<const Term> terms) noexcept {
  std::size_t columns = 0;
  for (const Term& term : terms) {
    columns += term.rank;
  }
  return columns;
}

// The term of a product that it keeps.
Term term_of(Factors factors) {
  const auto held = std::make_shared<const Factors>(std::move(factors));
  const auto reader = [&held](std::vector<double> Factors::* part) -> Reader {
    return [held, part](std::uint64_t first, std::size_t count, double* to) {
      const auto from = ((*held).*part).begin() + static_cast<std::ptrdiff_t>(first);
      std::copy_n(from, count, to);
    };
  };
  return {1, held->rank, reader(&Factors::b), reader(&Factors::a)};
}

class Tree {
 public:
  Tree(Shape shape, std::size_t keep, Workers* workers)
      : shape_(shape), keep_(keep), workers_(workers) {}

  // Terms of the same sum that have keep_ columns together at most.
  std::vector<Term> few(std::span<const Term> terms) {
    const std::size_t columns = columns_of(terms);
    if (columns <= keep_) {
      return {terms.begin(), terms.end()};
    }
    const bool one = terms.size() == 1 || columns <= kMostColumns;
    Factors found =
        recompress(shape_, one ? std::vector<Term>(terms.begin(), terms.end()) : halves(terms),
                   keep_, 1, workers_);
    cut_ += found.cut;
    return {term_of(std::move(found))};
  }

  std::vector<Term> halves(std::span<const Term> terms) {
    std::vector<Term> both = few(terms.first(terms.size() / 2));
    const std::vector<Term> rest = few(terms.subspan(terms.size() / 2));
    both.insert(both.end(), rest.begin(), rest.end());
    return both;
  }

  double cut() const noexcept { return cut_; }

 private:
  Shape shape_;
  std::size_t keep_;
  Workers* workers_;
  double cut_ = 0;
};

std::size_t kept_columns(std::size_t most) noexcept { return std::max(most, kMostColumns / 2); }

}  // namespace

Factors merge(Shape shape, const std::vector<Term>& terms, std::size_t most, double divisor,
              Workers* workers) {
  if (terms.size() == 1 || columns_of(terms) <= kMostColumns) {
    return recompress(shape, terms, most, divisor, workers);
  }
  Tree tree(shape, kept_columns(most), workers);
  Factors out = recompress(shape, tree.halves(terms), most, divisor, workers);
  out.cut += tree.cut() / divisor;
  return out;
}

std::size_t merge_scratch(Shape shape, std::size_t columns, std::size_t most,
                          unsigned threads) noexcept {
  if (columns <= kMostColumns) {
    return recompress_scratch(shape, columns, most, threads);
  }
  const std::size_t keep = kept_columns(most);
  std::size_t held = 2;  // results of nodes at the same time: one of each level, and one more
  for (std::size_t left = columns; left > keep; left = (left + 1) / 2) {
    ++held;
  }
  const auto sides = static_cast<std::size_t>(shape.rows + shape.columns);
  return recompress_scratch(shape, std::max(kMostColumns, 2 * keep), keep, threads) +
         held * keep * sides * sizeof(double);
}

}  // namespace fedcore::factors
