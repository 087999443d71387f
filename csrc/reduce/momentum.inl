// Server momentum (FedAvgM: Hsu, Qi and Brown 2019, https://arxiv.org/abs/1909.06335):
//   v <- momentum * v + step
//   x <- x + learning_rate * v
// with the new v as it is kept.
struct Momentum {
  static constexpr std::string_view kName = "momentum";
  static constexpr unsigned kVersion = 1;
  static constexpr std::string_view kStates[] = {"momentum"};
  static constexpr std::string_view kOptions[] = {"learning_rate", "momentum"};

  static double start(const double*, std::size_t) { return 0; }

  template <typename Word, typename V>
  static FEDCORE_HD void next(const double* options, V step, V& x, V* state) {
    state[0] = kept<Word>(options[1] * state[0] + step);
    x += options[0] * state[0];
  }
};
