// The weighted mean, as kernels.hpp defines it.
#include <algorithm>

#include "kernels/arith.hpp"
#include "kernels/kernels.hpp"
#include "reduce/families.hpp"

namespace fedcore {
namespace {

class Mean final : public Combiner {
 public:
  explicit Mean(const std::vector<double>& weights) : weights_(weights) {
    for (const double weight : weights) {
      total_ += weight;
    }
  }

  bool combine(Dtype dtype, const void* const* inputs, const void* base, void* out,
               std::uint64_t nbytes) override {
    return kernels::mean_here(dtype, inputs, weights_.data(), weights_.size(), total_, base, out,
                              nbytes);
  }

  bool combine_wide(Dtype dtype, const void* const* inputs, double* out,
                    std::size_t count) override {
    if (dtype != Dtype::kF64) {
      return kernels::mean_wide(dtype, inputs, weights_.data(), weights_.size(), total_, out,
                                count);
    }
    const std::size_t width = item_size(dtype);
    sums_.resize(kernels::kPiece * kernels::sums_per_element(dtype));
    for (std::size_t first = 0; first < count; first += kernels::kPiece) {
      const std::size_t n = std::min(kernels::kPiece, count - first);
      for (std::size_t k = 0; k < weights_.size(); ++k) {
        const auto* const input = static_cast<const std::uint8_t*>(inputs[k]) + first * width;
        kernels::fold(dtype, input, weights_[k], k == 0, sums_.data(), n * width);
      }
      kernels::finish_wide(dtype, sums_.data(), total_, out + first, n);
    }
    std::uint64_t bad = 0;
    for (std::size_t j = 0; j < count; ++j) {
      bad |= arith::non_finite(out[j]);
    }
    return bad == 0;
  }

  int combine_on_device(Dtype dtype, const void* const* inputs, const std::uint8_t* encodings,
                        const void* base, void* out, std::size_t count) noexcept override {
    return kernels::mean_on_device({static_cast<int>(dtype), weights_.size(), inputs, encodings,
                                    weights_.data(), total_, base, out, count});
  }

  void fold(Dtype dtype, std::size_t source, const void* input, double* sums,
            std::uint64_t nbytes) override {
    kernels::fold(dtype, input, weights_[source], source == 0, sums, nbytes);
  }

  void finish_fold(Dtype dtype, const double* sums, void* out, std::uint64_t nbytes) override {
    kernels::finish(dtype, sums, total_, out, nbytes);
  }

  void finish_fold_wide(Dtype dtype, const double* sums, double* out, std::size_t count) override {
    kernels::finish_wide(dtype, sums, total_, out, count);
  }

 private:
  std::vector<double> weights_;
  double total_ = 0;
  std::vector<double> sums_;  // of a piece of F64 in combine_wide()
};

std::size_t scratch(std::size_t k) { return (k + 4 * kernels::kPiece) * sizeof(double); }

std::unique_ptr<Combiner> make(const std::vector<double>& weights) {
  return std::make_unique<Mean>(weights);
}

}  // namespace

const Rule kMean{"mean", 1, {true, false, true, 1}, &scratch, &make, &kernels::sums_per_element};

}  // namespace fedcore
