// The weighted mean, as kernels.hpp defines it.
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
    return kernels::mean(dtype, inputs, weights_.data(), weights_.size(), total_, base, out,
                         nbytes);
  }

 private:
  std::vector<double> weights_;
  double total_ = 0;
};

std::size_t scratch(std::size_t k) { return k * sizeof(double); }

std::unique_ptr<Combiner> make(const std::vector<double>& weights) {
  return std::make_unique<Mean>(weights);
}

}  // namespace

const Rule kMean{"mean", 1, {true, false, true, 1}, &scratch, &make};

}  // namespace fedcore
