// Nesterov's momentum of the server (the outer step of DiLoCo: Douillard et al. 2023,
// https://arxiv.org/abs/2311.08105, in the form of Sutskever et al. 2013):
//   v <- momentum * v + step
//   x <- x + learning_rate * (momentum * v + step)
// with the new v as it is kept.
struct Nesterov {
  static constexpr std::string_view kName = "nesterov";
  static constexpr unsigned kVersion = 1;
  static constexpr std::string_view kStates[] = {"momentum"};
  static constexpr std::string_view kOptions[] = {"learning_rate", "momentum"};

  static double start(const double*, std::size_t) { return 0; }

  template <typename Word, typename V>
  static FEDCORE_HD void next(const double* options, V step, V& x, V* state) {
    state[0] = kept<Word>(options[1] * state[0] + step);
    x += options[0] * (options[1] * state[0] + step);
  }
};
