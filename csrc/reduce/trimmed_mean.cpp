// The coordinate-wise trimmed mean (Yin et al. 2018, "Byzantine-Robust Distributed Learning").
//
// Of each element the `trim` lowest and the `trim` highest values are left out (ranking.hpp says in
// which order), and the result is the mean of the others as kernels.hpp defines it, each with the
// weight 1, summed from the lowest to the highest. Weights do not count. With K = 2 trim + 1 that is
// the median.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "kernels/kernels.hpp"
#include "reduce/families.hpp"
#include "reduce/ranking.hpp"

namespace fedcore {
namespace {

constexpr std::string_view kOptions[] = {"trim"};

class TrimmedMean final : public Combiner {
 public:
  TrimmedMean(std::size_t k, std::size_t trim)
      : first_(trim),
        ranking_(k, trim, k - trim - 1),
        kept_(k - 2 * trim),
        mean_(kMean.make(std::vector<double>(kept_.size(), 1.0))) {}

  bool combine(Dtype dtype, const void* const* inputs, const void* base, void* out,
               std::uint64_t nbytes) override {
    if (!is_float(dtype)) {
      std::memcpy(out, base != nullptr ? base : inputs[0], nbytes);
      return true;
    }
    const std::size_t width = item_size(dtype);
    return ranking_.for_pieces(dtype, inputs, nbytes / width, [&](std::size_t at, std::size_t n) {
      mean_->combine(dtype, kept(dtype), nullptr, static_cast<std::uint8_t*>(out) + at * width,
                     n * width);
    });
  }

  bool combine_wide(Dtype dtype, const void* const* inputs, double* out,
                    std::size_t count) override {
    return ranking_.for_pieces(dtype, inputs, count, [&](std::size_t at, std::size_t n) {
      mean_->combine_wide(dtype, kept(dtype), out + at, n);
    });
  }

 private:
  const void* const* kept(Dtype dtype) {
    for (std::size_t i = 0; i < kept_.size(); ++i) {
      kept_[i] = ranking_.values(dtype, first_ + i);
    }
    return kept_.data();
  }

  std::size_t first_;
  Ranking ranking_;
  std::vector<const void*> kept_;
  std::unique_ptr<Combiner> mean_;
};

Rule with(const std::vector<double>& numbers) {
  constexpr double kMost = std::numeric_limits<std::int32_t>::max();
  const double number = numbers.front();
  if (!(number >= 1 && number <= kMost && std::trunc(number) == number)) {
    throw Error(Errc::kConfig, "trim: expected an integer of at least 1");
  }
  const auto trim = static_cast<std::size_t>(number);
  Rule rule = kTrimmedMean;
  rule.traits.least = 2 * trim + 1;
  rule.scratch = [trim](std::size_t k) {
    const std::size_t kept = k - 2 * std::min(trim, (k - 1) / 2);
    return Ranking::scratch(k, (k - kept) / 2, (k + kept) / 2 - 1) + kMean.scratch(kept);
  };
  rule.make = [trim](const std::vector<double>& weights) {
    return std::make_unique<TrimmedMean>(weights.size(), trim);
  };
  return rule;
}

}  // namespace

const Rule kTrimmedMean{
    .name = "trimmed-mean",
    .version = 1,
    .traits = {.weighted = false, .symmetric = true, .folds = false, .least = 3},
    .scratch = nullptr,
    .make = nullptr,
    .options = kOptions,
    .with = &with};

}  // namespace fedcore
