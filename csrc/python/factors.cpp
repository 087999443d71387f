// Products of factors in the module fedcore._core: recompress() and factor_error(), of arrays, and the
// class LoraRule: a rule for adapters, with the table of their groups.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/workers.hpp"
#include "codec/element.hpp"
#include "factors/figure.hpp"
#include "factors/merge.hpp"
#include "python/bindings.hpp"
#include "reduce/lora.hpp"

namespace fedcore {
namespace {

// A factor: a matrix of floats whose rows lie one after the other.
class Matrix {
 public:
  Matrix(const py::buffer& array, const std::optional<std::string>& dtype, const std::string& name)
      : bytes_(std::make_shared<Bytes>(array)) {
    const py::buffer_info info = array.request();
    if (info.ndim != 2) {
      throw Error(Errc::kLayout, name + " has " + std::to_string(info.ndim) + " axes; expected 2");
    }
    rows_ = static_cast<std::uint64_t>(info.shape[0]);
    columns_ = static_cast<std::uint64_t>(info.shape[1]);
    dtype_ = dtype ? parse_dtype(*dtype) : dtype_of(info.format, name);
    if (!is_float(dtype_) || item_size(dtype_) != static_cast<std::size_t>(info.itemsize)) {
      throw Error(Errc::kLayout, name + ": its elements are not of a float dtype");
    }
  }

  std::uint64_t rows() const noexcept { return rows_; }
  std::uint64_t columns() const noexcept { return columns_; }

  factors::Reader reader() const {
    return [bytes = bytes_, dtype = dtype_](std::uint64_t first, std::size_t count, double* to) {
      with_float(dtype, [&]<typename T>(T, double) {
        for (std::size_t i = 0; i < count; ++i) {
          to[i] = T::read(bytes->data(), first + i);
        }
      });
    };
  }

 private:
  static Dtype dtype_of(const std::string& format, const std::string& name) {
    const char kind = format.empty() ? '?' : format.back();
    switch (kind) {
      case 'd':
        return Dtype::kF64;
      case 'f':
        return Dtype::kF32;
      case 'e':
        return Dtype::kF16;
      default:
        throw Error(Errc::kLayout, name + ": its elements are not of a float dtype");
    }
  }

  std::shared_ptr<Bytes> bytes_;
  std::uint64_t rows_, columns_;
  Dtype dtype_;
};

// Terms, and the shape of their products.
class Terms {
 public:
  void add(double scale, const py::buffer& b, const py::buffer& a,
           const std::optional<std::string>& dtype) {
    const std::string name = "term " + std::to_string(terms_.size());
    const Matrix left(b, dtype, "B of " + name), right(a, dtype, "A of " + name);
    if (terms_.empty()) {
      shape_ = {left.rows(), right.columns()};
    }
    if (left.rows() != shape_.rows || right.columns() != shape_.columns ||
        left.columns() != right.rows()) {
      throw Error(Errc::kLayout, name + ": the shapes of B, A and the other terms do not fit");
    }
    terms_.push_back(
        {scale, static_cast<std::size_t>(left.columns()), left.reader(), right.reader()});
  }

  // (scale, B, A), or (scale, B, A, dtype).
  void add(const py::tuple& term) {
    if (term.size() != 3 && term.size() != 4) {
      throw Error(Errc::kLayout, "a term is (scale, B, A) or (scale, B, A, dtype)");
    }
    std::optional<std::string> dtype;
    if (term.size() == 4 && !term[3].is_none()) {
      dtype = term[3].cast<std::string>();
    }
    add(term[0].cast<double>(), term[1].cast<py::buffer>(), term[2].cast<py::buffer>(), dtype);
  }

  factors::Shape shape() const noexcept { return shape_; }
  const std::vector<factors::Term>& all() const noexcept { return terms_; }

 private:
  factors::Shape shape_{};
  std::vector<factors::Term> terms_;
};

py::array_t<double> array_of(const std::vector<double>& values, std::vector<py::ssize_t> shape) {
  py::array_t<double> out(std::move(shape));
  if (!values.empty()) {
    std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(double));
  }
  return out;
}

py::tuple py_recompress(const std::vector<py::tuple>& terms, std::size_t max_rank,
                        unsigned threads) {
  Terms checked;
  for (const py::tuple& term : terms) {
    checked.add(term);
  }
  if (terms.empty() || max_rank == 0) {
    throw Error(Errc::kConfig, "recompress needs a term and a rank of at least 1");
  }
  factors::Factors out;
  {
    const py::gil_scoped_release release;
    Workers workers(std::max(1u, threads));
    out = factors::merge(checked.shape(), checked.all(), max_rank, 1, &workers);
  }
  const auto rank = static_cast<py::ssize_t>(out.rank);
  py::dict info;
  info["norm"] = out.norm;
  info["cut"] = out.cut;
  info["rank"] = out.kept;
  return py::make_tuple(array_of(out.b, {static_cast<py::ssize_t>(checked.shape().rows), rank}),
                        array_of(out.a, {rank, static_cast<py::ssize_t>(checked.shape().columns)}),
                        array_of(out.sigma, {rank}), info);
}

py::tuple py_factor_error(const std::vector<double>& weights, const std::vector<py::tuple>& pairs,
                          const std::optional<py::tuple>& base, unsigned threads) {
  if (weights.size() != pairs.size()) {
    throw Error(Errc::kWeight, "there must be one weight per pair");
  }
  Terms checked;
  for (std::size_t k = 0; k < pairs.size(); ++k) {
    checked.add(py::reinterpret_steal<py::tuple>(
        PySequence_Concat(py::make_tuple(weights[k]).ptr(), pairs[k].ptr())));
  }
  std::vector<factors::Term> terms = checked.all();
  std::optional<factors::Term> of_base;
  if (base) {
    checked.add(py::reinterpret_steal<py::tuple>(
        PySequence_Concat(py::make_tuple(1.0).ptr(), base->ptr())));
    of_base = checked.all().back();
  }
  factors::Figure out{};
  {
    const py::gil_scoped_release release;
    Workers workers(std::max(1u, threads));
    out = factors::figure(checked.shape(), terms, of_base ? &*of_base : nullptr, &workers);
  }
  return py::make_tuple(out.sum, out.error, out.change);
}

// What the class LoraRule holds.
struct PyLoraRule {
  std::shared_ptr<LoraReports> reports;
  std::shared_ptr<const Rule> rule;
};

PyLoraRule make_lora(const std::string& method, const PyLayout& layout,
                     const std::vector<std::pair<std::string, std::string>>& groups,
                     std::size_t max_rank, bool figure, unsigned threads) {
  LoraOptions options{LoraMethod::kFactors, {}, max_rank, figure, std::max(1u, threads)};
  if (method == "exact") {
    options.method = LoraMethod::kExact;
  } else if (method == "products") {
    options.method = LoraMethod::kProducts;
  } else if (method != "factors") {
    throw Error(Errc::kConfig,
                "no LoRA rule is named '" + method + "'; expected one of factors, exact, products");
  }
  for (const auto& [b, a] : groups) {
    options.groups.push_back({b, a});
  }
  auto reports = std::make_shared<LoraReports>(groups.size());
  auto rule = lora_rule(layout, std::move(options), reports);
  return {std::move(reports), std::move(rule)};
}

py::list lora_reports(const PyLoraRule& lora) {
  py::list out;
  for (const std::optional<LoraReport>& report : lora.reports->all()) {
    if (!report) {
      out.append(py::none());
      continue;
    }
    py::dict of;
    of["sum"] = report->sum;
    of["change"] = report->change;
    of["error"] = report->error;
    of["cut"] = report->cut;
    of["rank"] = report->rank;
    out.append(of);
  }
  return out;
}

}  // namespace

std::shared_ptr<const Rule> lora_rule_of(const py::object& rule) {
  return py::isinstance<PyLoraRule>(rule) ? rule.cast<std::shared_ptr<PyLoraRule>>()->rule
                                          : nullptr;
}

void bind_factors(py::module_& m) {
  m.def("recompress", &py_recompress, py::arg("terms"), py::arg("max_rank"), py::arg("threads") = 1,
        "The best product B @ A of rank min(max_rank, rows, columns) of the sum of scale * B @ A "
        "over "
        "terms (scale, B, A) or (scale, B, A, dtype). Arrays are of F64, F32 or F16, or of what "
        "dtype "
        "names, such as 16-bit words for 'BF16'. Returns B, A and the singular values in binary64, "
        "and a "
        "dict: `norm` of the whole sum, `cut` of what was left out, numerical `rank` that was "
        "kept. Rows "
        "of A are orthonormal, columns of B have the singular values as norms. LayoutError for "
        "shapes "
        "that do not fit, NonFiniteError that names the term.");
  py::class_<PyLoraRule, std::shared_ptr<PyLoraRule>>(
      m, "LoraRule",
      "A rule for adapters, for outputs of one layout: groups = [(name of B, name of A)]. method: "
      "'factors', the mean of each factor; 'exact', the base plus the mean of what each source's "
      "product "
      "differs from what it was given, its rank's best part of the base; 'products', the mean of "
      "the "
      "products. The sources of the last two may have ranks of their own, up to max_rank. "
      "LayoutError "
      "for groups that the layout does not have.")
      .def(py::init(&make_lora), py::arg("method"), py::arg("layout"), py::arg("groups"),
           py::arg("max_rank"), py::arg("figure") = true, py::arg("threads") = 1)
      .def(
          "reports", &lora_reports,
          "Of each group whose output was made, norms: `sum` of the mean of the products, `change` "
          "to what the sources were given, `error` of the product of the means, `cut` by the "
          "rank; and `rank` of the output. None for the others; sum, change and error are 0 "
          "without "
          "figure.");
  m.def("factor_error", &py_factor_error, py::arg("weights"), py::arg("pairs"),
        py::arg("base") = std::nullopt, py::arg("threads") = 1,
        "How wrong the product of the means is, for pairs (B, A) or (B, A, dtype) with their scale "
        "in B: "
        "the norms of the weighted mean of the products, of its difference to mean(B) @ mean(A), "
        "and of "
        "its difference to `base`, a pair too. A factor of lower rank is filled up with zeros.");
}

}  // namespace fedcore
