// The coordinate-wise median (Yin et al. 2018, "Byzantine-Robust Distributed Learning").
//
// For an odd K the result has the bits of the middle value (ranking.hpp says in which order). For an
// even K the two middle values are added in binary64, halved, and rounded once; where the sum of two
// F64 values leaves the range, their halves are added, which is the same number. Weights do not
// count.
#include <cstring>

#include "kernels/arith.hpp"
#include "kernels/kernels.hpp"
#include "reduce/families.hpp"
#include "reduce/ranking.hpp"

namespace fedcore {
namespace {

constexpr std::size_t low_of(std::size_t k) { return (k - 1) / 2; }
constexpr std::size_t high_of(std::size_t k) { return k / 2; }

// Half the sum of two finite numbers; the halves are added where the sum leaves binary64's range.
double halfway(double low, double high) {
  const double sum = low + high;
  return arith::non_finite(sum) != 0 ? low * 0.5 + high * 0.5 : sum * 0.5;
}

class Median final : public Combiner {
 public:
  explicit Median(std::size_t k)
      : low_(low_of(k)), high_(high_of(k)), ranking_(k, low_of(k), high_of(k)) {}

  bool combine(Dtype dtype, const void* const* inputs, const void* base, void* out,
               std::uint64_t nbytes) override {
    if (!is_float(dtype)) {
      std::memcpy(out, base != nullptr ? base : inputs[0], nbytes);
      return true;
    }
    const std::size_t width = item_size(dtype);
    return ranking_.for_pieces(dtype, inputs, nbytes / width, [&](std::size_t at, std::size_t n) {
      write(dtype, static_cast<std::uint8_t*>(out) + at * width, n);
    });
  }

  bool combine_wide(Dtype dtype, const void* const* inputs, double* out,
                    std::size_t count) override {
    return ranking_.for_pieces(dtype, inputs, count, [&](std::size_t at, std::size_t n) {
      with_float(dtype, [&]<typename T>(T, double) { widen<T>(dtype, out + at, n); });
    });
  }

 private:
  // The results of a piece. For the formats below binary64 the mean of two is halfway() between
  // them, rounded once.
  void write(Dtype dtype, std::uint8_t* out, std::size_t n) {
    const std::size_t width = item_size(dtype);
    const void* const middle[2] = {ranking_.values(dtype, low_), ranking_.values(dtype, high_)};
    if (low_ == high_) {
      std::memcpy(out, middle[0], n * width);
    } else if (dtype == Dtype::kF64) {
      for (std::size_t i = 0; i < n; ++i) {
        const double half = halfway(value<Element<arith::F64>>(dtype, low_, i),
                                    value<Element<arith::F64>>(dtype, high_, i));
        std::memcpy(out + i * width, &half, width);
      }
    } else {
      constexpr double kWeights[2] = {1, 1};
      kernels::mean_here(dtype, middle, kWeights, 2, 2, nullptr, out, n * width);
    }
  }

  template <typename T>
  void widen(Dtype dtype, double* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
      const double a = value<T>(dtype, low_, i);
      out[i] = low_ == high_ ? a : halfway(a, value<T>(dtype, high_, i));
    }
  }

  template <typename T>
  double value(Dtype dtype, std::size_t rank, std::size_t i) const noexcept {
    return T::read(static_cast<const std::uint8_t*>(ranking_.values(dtype, rank)), i);
  }

  std::size_t low_, high_;
  Ranking ranking_;
};

std::size_t scratch(std::size_t k) { return Ranking::scratch(k, low_of(k), high_of(k)); }

std::unique_ptr<Combiner> make(const std::vector<double>& weights) {
  return std::make_unique<Median>(weights.size());
}

}  // namespace

const Rule kMedian{"median", 1, {false, true, false, 1}, &scratch, &make};

}  // namespace fedcore
