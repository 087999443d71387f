// The loops of distances. Included once per instruction set by pairs.cpp, inside a namespace of its own
// and a target region. Only functions of this file, the always inlined ones of arith.hpp and builtins
// are called here, so that no function of the library is compiled for the wrong target.

// The compiler's own vector types, as wide as this level's registers or wider.
typedef double Vd __attribute__((vector_size(8 * FEDCORE_LANES)));
typedef float Vf __attribute__((vector_size(4 * FEDCORE_LANES)));
typedef std::uint32_t Vu __attribute__((vector_size(4 * FEDCORE_LANES)));
typedef std::uint16_t Vh __attribute__((vector_size(2 * FEDCORE_LANES)));

// As many elements as a register of binary64 holds, in binary32.
template <typename Format>
FEDCORE_HD Vf load(const std::uint8_t* from) {
  Vf values;
  if constexpr (sizeof(typename Format::Word) == sizeof(float)) {
    __builtin_memcpy(&values, from, sizeof values);
  } else if constexpr (Format::largest() > 65504) {
    Vh halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    const Vu bits = __builtin_convertvector(halves, Vu) << 16;
    __builtin_memcpy(&values, &bits, sizeof values);
  } else {
    for (std::size_t lane = 0; lane < FEDCORE_LANES; ++lane) {
      std::uint16_t word;
      __builtin_memcpy(&word, from + lane * sizeof word, sizeof word);
      values[lane] = arith::half_to_float(word);
    }
  }
  return values;
}

// Values of a float dtype as binary64 numbers; not 0 if one is not finite.
template <typename Format>
std::uint64_t widen(const std::uint8_t* from, double* to, std::size_t count) {
  std::uint64_t bad = 0;
  std::size_t i = 0;
  if constexpr (sizeof(typename Format::Word) <= sizeof(float)) {
    Vf zero{};  // NaN once a value is not finite
    for (; i + FEDCORE_LANES <= count; i += FEDCORE_LANES) {
      const Vf narrow = load<Format>(from + i * sizeof(typename Format::Word));
      zero += narrow * 0.0f;
      const Vd wide = __builtin_convertvector(narrow, Vd);
      __builtin_memcpy(to + i, &wide, sizeof wide);
    }
    for (std::size_t lane = 0; lane < FEDCORE_LANES; ++lane) {
      bad |= zero[lane] == 0 ? 0u : 1u;
    }
  }
  for (; i < count; ++i) {
    typename Format::Word word;
    __builtin_memcpy(&word, from + i * sizeof word, sizeof word);
    to[i] = Format::decode(word);
    bad |= arith::non_finite(to[i]);
  }
  return bad;
}

// Each sum has eight lanes, whatever a register holds.
template <std::size_t kOthers>
FEDCORE_HD void add_some(const double* one, const double* others, std::size_t stride,
                         std::size_t count, double* sums) {
  constexpr std::size_t kParts = 8 / FEDCORE_LANES;
  Vd sum[kOthers][kParts];
  __builtin_memcpy(sum, sums, sizeof sum);
  for (std::size_t i = 0; i < count; i += 8) {
    for (std::size_t part = 0; part < kParts; ++part) {
      Vd x;
      __builtin_memcpy(&x, one + i + part * FEDCORE_LANES, sizeof x);
      for (std::size_t j = 0; j < kOthers; ++j) {
        Vd y;
        __builtin_memcpy(&y, others + j * stride + i + part * FEDCORE_LANES, sizeof y);
        const Vd difference = x - y;
        sum[j][part] += difference * difference;
      }
    }
  }
  __builtin_memcpy(sums, sum, sizeof sum);
}

// Adds the squares of the differences of `count` numbers, a multiple of 8, to those of each of the rows
// after it: to eight sums for each. As many rows at a time as the registers have room for.
void add_squares(const double* one, std::size_t rows, std::size_t stride, std::size_t count,
                 double* sums) {
  constexpr std::size_t kMost = FEDCORE_LANES == 8 ? 8 : 4;
  const double* others = one + stride;
  for (; rows >= kMost; rows -= kMost, others += kMost * stride, sums += 8 * kMost) {
    add_some<kMost>(one, others, stride, count, sums);
  }
  if constexpr (kMost > 4) {
    if (rows >= 4) {
      add_some<4>(one, others, stride, count, sums);
      rows -= 4;
      others += 4 * stride;
      sums += std::size_t{4} * 8;
    }
  }
  if (rows == 3) {
    add_some<3>(one, others, stride, count, sums);
  } else if (rows == 2) {
    add_some<2>(one, others, stride, count, sums);
  } else if (rows == 1) {
    add_some<1>(one, others, stride, count, sums);
  }
}

constexpr PairLoops kLoops{
    {&widen<arith::F64>, &widen<arith::F32>, &widen<arith::F16>, &widen<arith::Bf16>},
    &add_squares};
