// The loops of distances. Included once per instruction set by pairs.cpp, inside a namespace of its own
// and a target region. Only functions of this file, the always inlined ones of arith.hpp and builtins
// are called here, so that no function of the library is compiled for the wrong target.

typedef double Lanes __attribute__((vector_size(64)));

// Values of a float dtype as binary64 numbers; not 0 if one is not finite.
template <typename Format>
std::uint64_t widen(const std::uint8_t* from, double* to, std::size_t count) {
  std::uint64_t bad = 0;
  for (std::size_t i = 0; i < count; ++i) {
    typename Format::Word word;
    __builtin_memcpy(&word, from + i * sizeof word, sizeof word);
    to[i] = Format::decode(word);
    bad |= arith::non_finite(to[i]);
  }
  return bad;
}

template <std::size_t kOthers>
FEDCORE_HD void add_some(const double* one, const double* others, std::size_t stride,
                         std::size_t count, double* sums) {
  Lanes sum[kOthers];
  __builtin_memcpy(sum, sums, sizeof sum);
  for (std::size_t i = 0; i < count; i += 8) {
    Lanes x;
    __builtin_memcpy(&x, one + i, sizeof x);
    for (std::size_t j = 0; j < kOthers; ++j) {
      Lanes y;
      __builtin_memcpy(&y, others + j * stride + i, sizeof y);
      const Lanes difference = x - y;
      sum[j] += difference * difference;
    }
  }
  __builtin_memcpy(sums, sum, sizeof sum);
}

// Adds the squares of the differences of `count` numbers, a multiple of 8, to those of each of the rows
// after it: to eight sums for each.
void add_squares(const double* one, std::size_t rows, std::size_t stride, std::size_t count,
                 double* sums) {
  constexpr std::size_t kFour = 32;
  const double* others = one + stride;
  for (; rows >= 4; rows -= 4, others += 4 * stride, sums += kFour) {
    add_some<4>(one, others, stride, count, sums);
  }
  for (; rows > 0; --rows, others += stride, sums += 8) {
    add_some<1>(one, others, stride, count, sums);
  }
}

constexpr PairLoops kLoops{
    {&widen<arith::F64>, &widen<arith::F32>, &widen<arith::F16>, &widen<arith::Bf16>},
    &add_squares};
