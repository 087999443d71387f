// FedAdam (Reddi et al. 2021, https://arxiv.org/abs/2003.00295, Algorithm 2):
//   m <- beta1 * m + (1 - beta1) * step
//   v <- beta2 * v + (1 - beta2) * step^2    v starts at tau^2
//   x <- x + learning_rate * m / (sqrt(v) + tau)
// with the new m and v as they are kept. There is no correction of a bias in it.
struct Adam {
  static constexpr std::string_view kName = "adam";
  static constexpr unsigned kVersion = 1;
  static constexpr std::string_view kStates[] = {"momentum", "variance"};
  static constexpr std::string_view kOptions[] = {"learning_rate", "beta1", "beta2", "tau"};

  static double start(const double* options, std::size_t state) {
    return state == 0 ? 0 : options[3] * options[3];
  }

  template <typename Word, typename V>
  static FEDCORE_HD void next(const double* options, V step, V& x, V* state) {
    state[0] = kept<Word>(options[1] * state[0] + (1 - options[1]) * step);
    state[1] = kept<Word>(options[2] * state[1] + (1 - options[2]) * (step * step));
    x += options[0] * state[0] / (root(state[1]) + options[3]);
  }
};
