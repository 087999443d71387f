// FedAdagrad (Reddi et al. 2021, https://arxiv.org/abs/2003.00295, Algorithm 2, with beta1 = 0):
//   v <- v + step^2                          v starts at tau^2
//   x <- x + learning_rate * step / (sqrt(v) + tau)
// with the new v as it is kept.
struct Adagrad {
  static constexpr std::string_view kName = "adagrad";
  static constexpr unsigned kVersion = 1;
  static constexpr std::string_view kStates[] = {"variance"};
  static constexpr std::string_view kOptions[] = {"learning_rate", "tau"};

  static double start(const double* options, std::size_t) { return options[1] * options[1]; }

  template <typename Word, typename V>
  static FEDCORE_HD void next(const double* options, V step, V& x, V* state) {
    state[0] = kept<Word>(state[0] + step * step);
    x += options[0] * step / (root(state[0]) + options[1]);
  }
};
