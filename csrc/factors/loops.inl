// The loops over columns. Included once per instruction set by loops.cpp, inside a namespace of its own
// and a target region. Only functions of this file and builtins are called here, so that no function of
// the library is compiled for the wrong target.

// The compiler's own vector type, as wide as this level's registers or wider.
typedef double Vd __attribute__((vector_size(8 * FEDCORE_LANES)));

constexpr std::size_t kParts = 8 / FEDCORE_LANES;

FEDCORE_INLINE Vd load(const double* from) {
  Vd values;
  __builtin_memcpy(&values, from, sizeof values);
  return values;
}

FEDCORE_INLINE void store(const Vd& values, double* to) {
  __builtin_memcpy(to, &values, sizeof values);
}

// So many columns at a time that the sums keep the processor's adders busy.
template <std::size_t kColumns>
FEDCORE_INLINE void dots_of(const double* one, const double* columns, std::size_t stride,
                            std::size_t count, double* to) {
  Vd sums[kColumns][kParts] = {};
  for (std::size_t i = 0; i < count; i += 8) {
    for (std::size_t part = 0; part < kParts; ++part) {
      const std::size_t at = i + part * FEDCORE_LANES;
      const Vd x = load(one + at);
      for (std::size_t j = 0; j < kColumns; ++j) {
        sums[j][part] += x * load(columns + j * stride + at);
      }
    }
  }
  for (std::size_t j = 0; j < kColumns; ++j) {
    double lanes[8];
    __builtin_memcpy(lanes, sums[j], sizeof lanes);
    to[j] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
            ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
}

void dots(const double* one, const double* columns, std::size_t stride, std::size_t how_many,
          std::size_t count, double* to) {
  for (; how_many >= 4; how_many -= 4, columns += 4 * stride, to += 4) {
    dots_of<4>(one, columns, stride, count, to);
  }
  for (; how_many > 0; --how_many, columns += stride, ++to) {
    dots_of<1>(one, columns, stride, count, to);
  }
}

template <std::size_t kColumns>
FEDCORE_INLINE void add_to(const double* one, const double* by, double* columns, std::size_t stride,
                           std::size_t count) {
  for (std::size_t i = 0; i < count; i += FEDCORE_LANES) {
    const Vd x = load(one + i);
    for (std::size_t j = 0; j < kColumns; ++j) {
      double* const to = columns + j * stride + i;
      store(load(to) + x * by[j], to);
    }
  }
}

void add_multiples(const double* one, const double* by, double* columns, std::size_t stride,
                   std::size_t how_many, std::size_t count) {
  for (; how_many >= 4; how_many -= 4, columns += 4 * stride, by += 4) {
    const double factors[4] = {by[0], by[1], by[2], by[3]};
    add_to<4>(one, factors, columns, stride, count);
  }
  for (; how_many > 0; --how_many, columns += stride, ++by) {
    const double factor = *by;
    add_to<1>(one, &factor, columns, stride, count);
  }
}

void rotate(double* x, double* y, double c, double s, std::size_t count) {
  for (std::size_t i = 0; i < count; i += FEDCORE_LANES) {
    const Vd a = load(x + i), b = load(y + i);
    store(c * a - s * b, x + i);
    store(s * a + c * b, y + i);
  }
}

constexpr Loops kLoops{&dots, &add_multiples, &rotate};
