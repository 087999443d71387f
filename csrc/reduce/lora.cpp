#include "reduce/lora.hpp"

#include <algorithm>
#include <utility>

#include "base/error.hpp"
#include "base/workers.hpp"
#include "codec/element.hpp"
#include "factors/figure.hpp"
#include "factors/merge.hpp"
#include "reduce/families.hpp"
#include "reduce/lora_table.hpp"
#include "reduce/view.hpp"

namespace fedcore {
namespace {

using factors::Factors;
using factors::Reader;
using factors::Term;
using lora::axis;
using lora::find_pair;
using lora::find_tensor;
using lora::Found;
using lora::Member;
using lora::Pair;
using lora::Table;
using lora::tensor_at;

Reader reader_of(const View& view, const Tensor& factor) {
  return [&view, dtype = factor.dtype, offset = factor.offset](std::uint64_t first,
                                                               std::size_t count, double* to) {
    view.values(dtype, offset + first * item_size(dtype), to, count);
  };
}

Reader reader_of(const std::uint8_t* flat, const Tensor& factor) {
  return [from = at_offset(flat, factor.offset), dtype = factor.dtype](
             std::uint64_t first, std::size_t count, double* to) {
    widen(dtype, from + first * item_size(dtype), to, count);
  };
}

// A factor whose columns are multiplied by numbers of their own.
Reader with_columns_by(Reader reader, std::vector<double> by) {
  return [reader = std::move(reader), by = std::move(by)](std::uint64_t first, std::size_t count,
                                                          double* to) {
    reader(first, count, to);
    std::uint64_t column = first % by.size();
    for (std::size_t i = 0; i < count; ++i) {
      to[i] *= by[column];
      column = column + 1 == by.size() ? 0 : column + 1;
    }
  };
}

// Factors with zeros for what the output's rank is beyond the shape.
Factors filled_up(Factors made, const Pair& pair) {
  if (made.rank == pair.rank) {
    return made;
  }
  std::vector<double> b(pair.shape.rows * pair.rank);
  for (std::uint64_t row = 0; row < pair.shape.rows; ++row) {
    std::copy_n(made.b.begin() + static_cast<std::ptrdiff_t>(row * made.rank), made.rank,
                b.begin() + static_cast<std::ptrdiff_t>(row * pair.rank));
  }
  made.b = std::move(b);
  made.a.resize(pair.rank * pair.shape.columns);
  made.rank = pair.rank;
  return made;
}

class Lora final : public Combiner {
 public:
  Lora(std::shared_ptr<const Table> table, const std::vector<double>& weights)
      : table_(std::move(table)),
        weights_(weights),
        mean_(kMean.make(weights)),
        workers_(table_->options.threads) {
    for (const double weight : weights) {
      total_ += weight;
    }
  }

  void see(const Layout&, Range, std::span<const View> views) override { views_ = views; }

  void combine_seen(Dtype dtype, std::uint64_t offset, const void* base, double* out,
                    std::size_t count) override {
    const std::size_t width = item_size(dtype);
    const auto* from = static_cast<const std::uint8_t*>(base);
    while (count > 0) {
      const Tensor& tensor = tensor_at(*table_->layout, offset);
      const std::uint64_t first = (offset - tensor.offset) / width;
      const auto n =
          static_cast<std::size_t>(std::min<std::uint64_t>(count, tensor.nbytes / width - first));
      combine_tensor(tensor, first, from != nullptr ? from - offset : nullptr, out, n);
      out += n;
      count -= n;
      offset += n * width;
      from = from != nullptr ? from + n * width : nullptr;
    }
  }

 private:
  bool exact() const noexcept { return table_->options.method != LoraMethod::kFactors; }

  // `flat`: the base's flat bytes, or nullptr.
  void combine_tensor(const Tensor& tensor, std::uint64_t first, const std::uint8_t* flat,
                      double* out, std::size_t count) {
    const Member* const member = table_->member(tensor);
    if (member != nullptr && (exact() || table_->options.figure)) {
      prepare(member->group, flat);
    }
    if (member != nullptr && exact()) {
      const std::vector<double>& of = member->is_b ? made_.b : made_.a;
      std::copy_n(of.begin() + static_cast<std::ptrdiff_t>(first), count, out);
      return;
    }
    if (find_tensor(views_[0].layout(), tensor.name) == nullptr) {
      if (flat == nullptr) {
        throw Error(Errc::kConfig, "no source has the tensor '" + tensor.name + "', and no base");
      }
      widen(tensor.dtype, flat + tensor.offset + first * item_size(tensor.dtype), out, count);
      return;
    }
    combine_means(tensor, member, first, out, count);
  }

  // The bits of the rule "mean", of sources that are filled up with zeros.
  void combine_means(const Tensor& tensor, const Member* member, std::uint64_t first, double* out,
                     std::size_t count) {
    const std::size_t width = item_size(tensor.dtype);
    values_.resize(count);
    raw_.resize(views_.size() * count * width);
    std::vector<const void*> inputs;
    for (std::size_t k = 0; k < views_.size(); ++k) {
      const Tensor& own = *find_tensor(views_[k].layout(), tensor.name);
      if (member != nullptr && own.shape != tensor.shape) {
        read_filled(views_[k], own, tensor, member->is_b, first, count);
      } else {
        views_[k].values(own.dtype, own.offset + first * width, values_.data(), count);
      }
      std::uint8_t* const to = raw_.data() + k * count * width;
      with_float(tensor.dtype, [&]<typename T>(T, double limit) {
        for (std::size_t i = 0; i < count; ++i) {
          T::write(to, i, values_[i], limit);
        }
      });
      inputs.push_back(to);
    }
    mean_->combine_wide(tensor.dtype, inputs.data(), out, count);  // the caller checks the numbers
  }

  // Elements of a factor of lower rank, at their places in the output's.
  void read_filled(const View& view, const Tensor& own, const Tensor& tensor, bool is_b,
                   std::uint64_t first, std::size_t count) {
    const std::size_t width = item_size(tensor.dtype);
    std::fill(values_.begin(), values_.end(), 0.0);
    const std::uint64_t from_row = axis(own, 1), to_row = axis(tensor, 1);
    for (std::uint64_t at = first; at < first + count;) {
      const std::uint64_t row = at / to_row, column = at % to_row;
      const std::uint64_t end = std::min(first + count, (row + 1) * to_row);
      const std::uint64_t there = is_b ? from_row : row < axis(own, 0) ? to_row : 0;
      if (column < there) {
        const std::uint64_t n = std::min(end - at, there - column);
        view.values(own.dtype, own.offset + (row * from_row + column) * width,
                    values_.data() + (at - first), static_cast<std::size_t>(n));
      }
      at = end;
    }
  }

  // Makes the factors of a group, or its figure, unless they are those that were made last. A group's
  // tensors are neighbours in most layouts, so that it is made once.
  void prepare(std::size_t group, const std::uint8_t* flat) {
    if (group_ == group) {
      return;
    }
    group_.reset();
    const Pair& pair = table_->pairs[group];
    std::vector<Term> terms;
    for (std::size_t k = 0; k < views_.size(); ++k) {
      const Found found = find_pair(*table_, views_[k].layout(), pair);
      if (found.rank == 0) {  // neither factor: both stay as they are
        group_ = group;
        return;
      }
      if ((found.b == nullptr || found.a == nullptr) && flat == nullptr) {
        throw Error(Errc::kConfig,
                    "a factor of '" + pair.b->name + "' is in no source, and no base");
      }
      terms.push_back(
          {weights_[k], found.rank,
           found.b != nullptr ? reader_of(views_[k], *found.b) : reader_of(flat, *pair.b),
           found.a != nullptr ? reader_of(views_[k], *found.a) : reader_of(flat, *pair.a)});
    }
    LoraReport report;
    const std::vector<double> left = left_of(pair, terms);
    if (table_->options.figure) {
      add_figure(pair, terms, left, flat, report);
    }
    if (exact()) {
      if (table_->options.method == LoraMethod::kExact && flat != nullptr) {
        terms.insert(terms.begin(), {1, pair.rank, with_columns_by(reader_of(flat, *pair.b), left),
                                     reader_of(flat, *pair.a)});
      }
      made_ = filled_up(factors::merge(pair.shape, terms, pair.rank, total_, &workers_), pair);
      report.cut = made_.cut;
      report.rank = made_.kept;
    }
    if (table_->reports != nullptr) {
      table_->reports->put(group, report);
    }
    group_ = group;
  }

  // Of each column of the base, the weight of the sources that it was not given to.
  std::vector<double> left_of(const Pair& pair, const std::vector<Term>& terms) const {
    std::vector<double> left;
    for (std::size_t i = 0; i < pair.rank; ++i) {
      double given = 0;
      for (std::size_t k = 0; k < terms.size(); ++k) {
        given += terms[k].rank > i ? weights_[k] : 0;
      }
      left.push_back(total_ - given);
    }
    return left;
  }

  void add_figure(const Pair& pair, const std::vector<Term>& terms, const std::vector<double>& left,
                  const std::uint8_t* flat, LoraReport& report) {
    Term base{1, pair.rank, {}, {}};
    if (flat != nullptr) {
      std::vector<double> given;
      for (const double weight : left) {
        given.push_back((total_ - weight) / total_);
      }
      base.b = with_columns_by(reader_of(flat, *pair.b), std::move(given));
      base.a = reader_of(flat, *pair.a);
    }
    const factors::Figure figure =
        factors::figure(pair.shape, terms, flat != nullptr ? &base : nullptr, &workers_);
    report.sum = figure.sum;
    report.change = figure.change;
    report.error = figure.error;
  }

  std::shared_ptr<const Table> table_;
  std::vector<double> weights_;
  double total_ = 0;
  std::unique_ptr<Combiner> mean_;
  Workers workers_;
  std::span<const View> views_;
  std::optional<std::size_t> group_;  // whose factors made_ has
  Factors made_{};
  std::vector<double> values_;
  std::vector<std::uint8_t> raw_;
};

std::size_t scratch_of(const Table& table, std::size_t k) {
  std::size_t most = 0;
  const unsigned threads = table.options.threads;
  for (const Pair& pair : table.pairs) {
    const bool exact = table.options.method != LoraMethod::kFactors;
    const std::size_t rank = exact ? table.options.most_rank : pair.rank;
    const std::size_t columns = k * rank + pair.rank;
    std::size_t bytes =
        table.options.figure ? factors::figure_scratch(pair.shape, rank, threads) : 0;
    if (exact) {
      const auto sides = static_cast<std::size_t>(pair.shape.rows + pair.shape.columns);
      bytes = std::max(bytes, factors::merge_scratch(pair.shape, columns, pair.rank, threads)) +
              2 * pair.rank * sides * sizeof(double);
    }
    most = std::max(most, bytes);
  }
  return most + kMean.scratch(k) + (2 * k + 2) * 8 * sizeof(double) * 1024;
}

}  // namespace

void LoraReports::put(std::size_t group, const LoraReport& report) {
  const std::lock_guard lock(mutex_);
  reports_[group] = report;
}

std::vector<std::optional<LoraReport>> LoraReports::all() const {
  const std::lock_guard lock(mutex_);
  return reports_;
}

std::shared_ptr<const Rule> lora_rule(std::shared_ptr<const Layout> layout, LoraOptions options,
                                      std::shared_ptr<LoraReports> reports) {
  auto table = std::make_shared<Table>();
  table->layout = std::move(layout);
  table->options = std::move(options);
  table->reports = std::move(reports);
  lora::add_pairs(*table);
  auto rule = std::make_shared<Rule>();
  rule->name = table->options.method == LoraMethod::kFactors ? "lora-factors"
               : table->options.method == LoraMethod::kExact ? "lora-exact"
                                                             : "lora-products";
  rule->version = 1;
  rule->traits = {
      .weighted = true, .symmetric = false, .folds = false, .least = 1, .unit = Unit::kGroup};
  rule->slow = true;
  rule->scratch = [table](std::size_t k) { return scratch_of(*table, k); };
  rule->make = [table](const std::vector<double>& weights) {
    return std::make_unique<Lora>(table, weights);
  };
  rule->needs = [table](const Layout& out, Range range, const std::vector<const Layout*>& sources,
                        std::size_t k) { return lora::needs_of(*table, out, range, sources, k); };
  return rule;
}

}  // namespace fedcore
