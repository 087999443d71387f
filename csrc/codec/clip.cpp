// The stage "clip": the Euclidean norm of an update's differences is at most the option `norm`. A
// larger update is scaled, all elements by one factor, as in DP-FedAvg (McMahan et al. 2018,
// https://arxiv.org/abs/1710.06963, section 3).
//
// The bound holds for what the receiver decodes: the encoding's rounding may lengthen an update, which
// is then encoded again with a smaller factor. So the first factor aims a little below the bound.
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <string_view>

#include "base/error.hpp"
#include "codec/stage_kinds.hpp"

namespace fedcore {
namespace {

constexpr double kAim = 1 - 0x1p-12;
// What the norm that is computed may be off: differences are rounded to binary32, and sums.
constexpr double kRounding = 1 - 0x1p-22;
// So often an update is encoded again; then it is scaled to zero, which every encoding keeps.
constexpr int kAttempts = 8;

class Clip : public Stage {
 public:
  explicit Clip(double norm) : norm_(norm) {}
  Clip(double norm, double factor, int attempts)
      : norm_(norm), factor_(factor), attempts_(attempts), is_fitted_(true) {}

  bool asks_first() const noexcept override { return !is_fitted_; }
  bool bounds() const noexcept override { return true; }

  void apply(const Run& part, float* differences) const override {
    if (factor_ == 1) {
      return;
    }
    const std::size_t count = part.nbytes / item_size(part.dtype);
    for (std::size_t i = 0; i < count; ++i) {
      differences[i] = static_cast<float>(static_cast<double>(differences[i]) * factor_);
    }
  }

  // Squares of binary32 numbers are exact in binary64.
  void sum(const Run& part, const float* differences, StageSums& sums) const override {
    const std::size_t count = part.nbytes / item_size(part.dtype);
    StageSums squares = sums;
    std::size_t i = 0;
    for (; i + squares.size() <= count; i += squares.size()) {
      for (std::size_t lane = 0; lane < squares.size(); ++lane) {
        const double value = differences[i + lane];
        squares[lane] += value * value;
      }
    }
    for (std::size_t lane = 0; i < count; ++i, ++lane) {
      const double value = differences[i];
      squares[lane] += value * value;
    }
    sums = squares;
  }

  double figure(const StageSums& s) const override {
    return std::sqrt(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
  }

  std::shared_ptr<const Stage> fitted(const StageSums& sums) const override {
    const double found = figure(sums);
    return std::make_shared<Clip>(norm_, found > norm_ * kRounding ? norm_ * kAim / found : 1.0, 0);
  }

  std::shared_ptr<const Stage> tightened(const StageSums& decoded) const override {
    const double found = figure(decoded);
    if (found <= norm_ * kRounding) {
      return nullptr;
    }
    // Where differences are few steps of the dtype, a smaller factor may round to the same values. So
    // each attempt goes further than the norm alone asks for: 1/128 at first, half in the end.
    const double further = 1 - std::ldexp(1.0, attempts_ - kAttempts);
    const double factor = attempts_ < kAttempts ? factor_ * further * (norm_ * kAim / found) : 0.0;
    return std::make_shared<Clip>(norm_, factor, attempts_ + 1);
  }

 private:
  double norm_;
  double factor_ = 1;
  int attempts_ = 0;
  bool is_fitted_ = false;
};

std::shared_ptr<const Stage> make_clip(const double* options) {
  const double norm = options[0];
  if (!(norm > 0) || norm == std::numeric_limits<double>::infinity()) {
    throw Error(Errc::kConfig, "the norm of clip is " + std::to_string(norm) +
                                   ": expected a positive, finite number");
  }
  return std::make_shared<Clip>(norm);
}

constexpr std::string_view kOptions[] = {"norm"};

}  // namespace

const StageKind kClip{"clip", kOptions, make_clip};

}  // namespace fedcore
