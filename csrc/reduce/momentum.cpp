// Server momentum (FedAvgM: Hsu, Qi and Brown 2019, https://arxiv.org/abs/1909.06335):
//   v <- momentum * v + step
//   x <- x + learning_rate * v
// with the new v as it is kept.
#include <limits>
#include <string_view>

#include "kernels/arith.hpp"
#include "reduce/finish.hpp"
#include "reduce/finishers.hpp"

namespace fedcore {
namespace {

template <typename Word>
void momentum(const double* options, const FinishPiece<Word>& piece) {
  constexpr double kLargest = std::numeric_limits<Word>::max();
  const double learning_rate = options[0], decay = options[1];
  const Word* const before = piece.before[0];
  Word* const after = piece.after[0];
  for (std::size_t i = 0; i < piece.n; ++i) {
    double v = decay * static_cast<double>(before[i]) + piece.step[i];
    v = v > kLargest ? kLargest : v;
    v = v < -kLargest ? -kLargest : v;
    after[i] = static_cast<Word>(v);
    piece.x[i] += learning_rate * static_cast<double>(after[i]);
  }
}

constexpr std::string_view kStates[] = {"momentum"};
constexpr std::string_view kOptions[] = {"learning_rate", "momentum"};

}  // namespace

const FinisherKind kMomentum{"momentum", 1, kStates, kOptions, &momentum<float>, &momentum<double>};

}  // namespace fedcore
