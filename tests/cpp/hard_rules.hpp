// Two rules that see more of a source than one element: sources of other layouts than the output's,
// and sources of other bases than each other's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "reduce/rule.hpp"
#include "reduce/view.hpp"

namespace fedcore {

// Adapters of a layer "l" are tensors "l.A" of rank x columns and "l.B" of rows x rank, F32. Those of
// the output have room for more ranks; what is left is 0.
inline const Tensor& tensor_of(const Layout& layout, const std::string& name) {
  for (const Tensor& tensor : layout.tensors()) {
    if (tensor.name == name) {
      return tensor;
    }
  }
  throw Error(Errc::kLayout, "there is no tensor " + name);
}

// Whether a tensor is a factor, and if so the name of its layer.
inline bool layer_of(const Tensor& tensor, std::string& layer) {
  const std::size_t dot = tensor.name.rfind('.');
  layer = tensor.name.substr(0, dot);
  return dot != std::string::npos && tensor.dtype == Dtype::kF32;
}

// Both factors of every layer that a range of the output touches: B is scaled by what A holds.
inline std::vector<Range> factors(const Layout& out, Range range,
                                  const std::vector<const Layout*>& sources, std::size_t k) {
  std::uint64_t ranks = 0;
  std::vector<Range> needs;
  for (const Tensor& tensor : out.tensors()) {
    std::string layer;
    if (!layer_of(tensor, layer)) {
      continue;
    }
    ranks = 0;
    for (const Layout* const source : sources) {
      ranks += static_cast<std::uint64_t>(tensor_of(*source, layer + ".A").shape[0]);
    }
    if (ranks > static_cast<std::uint64_t>(tensor_of(out, layer + ".A").shape[0])) {
      throw Error(Errc::kLayout, "the ranks of " + layer + " are more than the output has");
    }
    if (tensor.offset < range.offset + range.nbytes &&
        range.offset < tensor.offset + tensor.nbytes) {
      for (const char* const side : {".A", ".B"}) {
        const Tensor& factor = tensor_of(*sources[k], layer + side);
        needs.push_back({factor.offset, factor.nbytes});
      }
    }
  }
  return needs;
}

// A of the output is all A below each other, each divided by a power of 2 that makes its largest
// magnitude lie in 0.5 to 1. B is all B side by side, times that power and the weight.
class Joined final : public Combiner {
 public:
  explicit Joined(std::vector<double> weights) : weights_(std::move(weights)) {}

  void see(const Layout& out, Range, std::span<const View> views) override {
    out_ = &out;
    views_ = views;
    layer_.clear();
  }

  void combine_seen(Dtype, std::uint64_t offset, const void*, double* out,
                    std::size_t count) override {
    for (std::size_t i = 0; i < count; ++i) {
      const Location where = out_->locate(offset + i * sizeof(float));
      const std::string name(where.tensor);
      const Tensor& tensor = tensor_of(*out_, name);
      std::string layer;
      layer_of(tensor, layer);
      prepare(layer);
      const auto columns = static_cast<std::uint64_t>(tensor.shape[1]);
      const std::uint64_t row = where.element / columns, column = where.element % columns;
      out[i] = name.ends_with(".A") ? below(layer, row, column) : beside(layer, row, column);
    }
  }

 private:
  void prepare(const std::string& layer) {
    if (layer == layer_) {
      return;
    }
    layer_ = layer;
    scales_.clear();
    for (const View& view : views_) {
      const Tensor& a = tensor_of(view.layout(), layer + ".A");
      std::vector<double> values(a.nbytes / sizeof(float));
      view.values(Dtype::kF32, a.offset, values.data(), values.size());
      double most = 0;
      for (const double value : values) {
        most = std::max(most, std::abs(value));
      }
      int exponent = 0;
      std::frexp(most, &exponent);
      scales_.push_back(std::ldexp(1.0, exponent));
    }
  }

  double element(std::size_t k, const std::string& name, std::uint64_t row, std::uint64_t column) {
    const Tensor& tensor = tensor_of(views_[k].layout(), name);
    const auto columns = static_cast<std::uint64_t>(tensor.shape[1]);
    double value = 0;
    views_[k].values(Dtype::kF32, tensor.offset + (row * columns + column) * sizeof(float), &value,
                     1);
    return value;
  }

  // Which source holds a rank of the output, and which rank of its own that is.
  bool find(const std::string& layer, std::uint64_t& rank, std::size_t& k) const {
    for (k = 0; k < views_.size(); ++k) {
      const auto own =
          static_cast<std::uint64_t>(tensor_of(views_[k].layout(), layer + ".A").shape[0]);
      if (rank < own) {
        return true;
      }
      rank -= own;
    }
    return false;
  }

  double below(const std::string& layer, std::uint64_t rank, std::uint64_t column) {
    std::size_t k = 0;
    return find(layer, rank, k) ? element(k, layer + ".A", rank, column) / scales_[k] : 0;
  }

  double beside(const std::string& layer, std::uint64_t row, std::uint64_t rank) {
    std::size_t k = 0;
    return find(layer, rank, k) ? weights_[k] * element(k, layer + ".B", row, rank) * scales_[k]
                                : 0;
  }

  std::vector<double> weights_;
  const Layout* out_ = nullptr;
  std::span<const View> views_;
  std::string layer_;  // of which scales_ are
  std::vector<double> scales_;
};

// x + sum w (y - base), each base of its own version.
class Relative final : public Combiner {
 public:
  explicit Relative(std::vector<double> weights) : weights_(std::move(weights)) {}

  void see(const Layout&, Range, std::span<const View> views) override { views_ = views; }

  void combine_seen(Dtype dtype, std::uint64_t offset, const void* base, double* out,
                    std::size_t count) override {
    std::vector<double> x(count), step(count);
    widen(dtype, base, x.data(), count);
    std::fill_n(out, count, 0.0);
    for (std::size_t k = 0; k < views_.size(); ++k) {
      views_[k].differences(dtype, offset, step.data(), count);
      for (std::size_t i = 0; i < count; ++i) {
        out[i] += weights_[k] * step[i];
      }
    }
    for (std::size_t i = 0; i < count; ++i) {
      out[i] += x[i];
    }
  }

 private:
  std::vector<double> weights_;
  std::span<const View> views_;
};

}  // namespace fedcore
