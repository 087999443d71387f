// The loop bodies. Included once per instruction set by kernels.cpp, inside a namespace of its own
// and a target region; FEDCORE_F16C says whether the F16C and FMA instructions may be used,
// FEDCORE_LANES how many binary64 values a register holds. Only plain functions of this file, the
// always inlined ones of arith.hpp and builtins appear here, so that no function of the library is
// compiled for the wrong target.

// --- Vectors ---
//
// The compiler's own vector types, as wide as this level's registers; where they are wider than a
// register it splits them. Every operation is the IEEE one of its lanes, so no level differs in a
// bit, and neither does the scalar tail.

typedef double Vd __attribute__((vector_size(8 * FEDCORE_LANES)));
typedef float Vf __attribute__((vector_size(4 * FEDCORE_LANES)));
typedef std::int64_t Vl __attribute__((vector_size(8 * FEDCORE_LANES)));
typedef std::uint32_t Vu __attribute__((vector_size(4 * FEDCORE_LANES)));
typedef std::uint16_t Vh __attribute__((vector_size(2 * FEDCORE_LANES)));

constexpr std::size_t kLanes = FEDCORE_LANES;
constexpr std::size_t kStep = 4 * kLanes;  // elements per turn of the inner loop
constexpr std::size_t kGroup = 8;          // inputs per pass over a block

template <typename To, typename From>
FEDCORE_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename V>
FEDCORE_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename V>
FEDCORE_INLINE void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

FEDCORE_INLINE Vd multiply_add(Vd a, Vd b, Vd c) {
#if FEDCORE_LANES == 8
  return reinterpret_cast<Vd>(_mm512_fmadd_pd(
      reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif FEDCORE_F16C
  return reinterpret_cast<Vd>(_mm256_fmadd_pd(
      reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#else
  return a * b + c;
#endif
}

// sum / total, correctly rounded. With fused multiply-adds: a product with the reciprocal,
// corrected twice by its exact remainder (Markstein 1990: one correction rounds right from within
// an ulp, the first brings it there). Sums are far from the ends of binary64's range. A zero keeps
// its sign.
FEDCORE_INLINE Vd divide(Vd sum, Vd total, Vd reciprocal) {
#if FEDCORE_F16C
  Vd quotient = sum * reciprocal;
  for (int i = 0; i < 2; ++i) {
    const Vd remainder = multiply_add(-quotient, total, sum);
    quotient = multiply_add(remainder, reciprocal, quotient);
  }
  const Vl sign = bits_as<Vl>(sum) & (Vl{} + INT64_MIN);
  return bits_as<Vd>(bits_as<Vl>(quotient) | sign);
#else
  static_cast<void>(reciprocal);
  return sum / total;
#endif
}

// The integer lanes of means rounded to binary32 "to odd", as by arith::to_odd_float_bits. The bits
// of a larger magnitude are the larger integer where signs are equal.
#if FEDCORE_LANES == 8
FEDCORE_INLINE __m256i odd_bits(const double* from) {
  const auto value = load<__m512d>(from);
  const auto nearest = bits_as<__m256>(__builtin_convertvector(load<Vd>(from), Vf));
  const auto back = bits_as<__m512d>(__builtin_convertvector(bits_as<Vf>(nearest), Vd));
  const __mmask8 grew =
      _mm512_cmpgt_epi64_mask(_mm512_castpd_si512(back), _mm512_castpd_si512(value));
  const __mmask8 inexact = _mm512_cmp_pd_mask(back, value, _CMP_NEQ_UQ);
  const __m256i one = _mm256_set1_epi32(1);
  __m256i bits = _mm256_castps_si256(nearest);
  bits = _mm256_mask_sub_epi32(bits, grew, bits, one);
  return _mm256_mask_or_epi32(bits, inexact, bits, one);
}
#elif FEDCORE_F16C
FEDCORE_INLINE __m128i low_halves(__m256d lanes) {
  return _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(_mm256_castpd256_pd128(lanes)),
                                         _mm_castpd_ps(_mm256_extractf128_pd(lanes, 1)), 0x88));
}

FEDCORE_INLINE __m128i odd_bits(const double* from) {
  const __m256d value = load<__m256d>(from);
  const __m128 nearest = _mm256_cvtpd_ps(value);
  const __m256d back = _mm256_cvtps_pd(nearest);
  const __m256d grew = _mm256_castsi256_pd(
      _mm256_cmpgt_epi64(_mm256_castpd_si256(back), _mm256_castpd_si256(value)));
  const __m256d inexact = _mm256_cmp_pd(back, value, _CMP_NEQ_UQ);
  const __m128i bits = _mm_add_epi32(_mm_castps_si128(nearest), low_halves(grew));
  return _mm_or_si128(bits, _mm_and_si128(low_halves(inexact), _mm_set1_epi32(1)));
}
#endif

// How elements of a dtype become floats, which hold each of them exactly, and how `n` means (a
// multiple of kLanes) go back.
struct F32 : arith::F32 {
  typedef UnalignedU32 Word;
  static FEDCORE_INLINE Vf read(const Word* from) { return load<Vf>(from); }
  static FEDCORE_INLINE void write(Word* to, const double* from, std::size_t n) {
    for (std::size_t j = 0; j < n; j += kLanes) {
      store(to + j, __builtin_convertvector(load<Vd>(from + j), Vf));
    }
  }
};

struct Bf16 : arith::Bf16 {
  typedef UnalignedU16 Word;
  static FEDCORE_INLINE Vf read(const Word* from) {
#if FEDCORE_LANES == 8
    return bits_as<Vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
#elif FEDCORE_F16C
    return bits_as<Vf>(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadu_si64(from)), 16));
#else
    return bits_as<Vf>(__builtin_convertvector(load<Vh>(from), Vu) << 16);
#endif
  }
  static FEDCORE_INLINE void write(Word* to, const double* from, std::size_t n) {
    std::size_t j = 0;
#if FEDCORE_LANES == 8
    for (; j < n; j += 8) {
      const __m256i bits = odd_bits(from + j);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
      store(to + j, _mm256_cvtepi32_epi16(_mm256_srli_epi32(_mm256_add_epi32(bits, up), 16)));
    }
#elif FEDCORE_F16C
    for (; j < n; j += 4) {
      const __m128i bits = odd_bits(from + j);
      const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
      const __m128i up = _mm_add_epi32(odd, _mm_set1_epi32(0x7FFF));
      const __m128i wide = _mm_srli_epi32(_mm_add_epi32(bits, up), 16);
      _mm_storeu_si64(to + j, _mm_packus_epi32(wide, wide));
    }
#endif
    for (; j < n; ++j) {
      to[j] = encode(from[j]);
    }
  }
};

struct F16 : arith::F16 {
  typedef UnalignedU16 Word;
  static FEDCORE_INLINE Vf read(const Word* from) {
#if FEDCORE_LANES == 8
    return bits_as<Vf>(_mm256_cvtph_ps(load<__m128i>(from)));
#elif FEDCORE_F16C
    return bits_as<Vf>(_mm_cvtph_ps(_mm_loadu_si64(from)));
#else
    const Vu half = __builtin_convertvector(load<Vh>(from), Vu);
    const Vu magnitude = (half & 0x7FFF) << 13;
    const Vu finite = bits_as<Vu>(bits_as<Vf>(magnitude) * 0x1p112f);
    const Vu exponent = bits_as<Vu>(magnitude >= 0x0F800000) & 0x7F800000;
    return bits_as<Vf>(finite | exponent | ((half & 0x8000) << 16));
#endif
  }
  static FEDCORE_INLINE void write(Word* to, const double* from, std::size_t n) {
    std::size_t j = 0;
#if FEDCORE_LANES == 8
    for (; j < n; j += 8) {
      store(to + j, _mm256_cvtps_ph(_mm256_castsi256_ps(odd_bits(from + j)), 0));
    }
#elif FEDCORE_F16C
    for (; j < n; j += 4) {
      _mm_storeu_si64(to + j, _mm_cvtps_ph(_mm_castsi128_ps(odd_bits(from + j)), 0));
    }
#endif
    for (; j < n; ++j) {
      to[j] = encode(from[j]);
    }
  }
};

// sum[j] = or += the weighted inputs of one group, in order; the sums stay in registers meanwhile.
template <typename T>
FEDCORE_INLINE void add_group(double* sum, const void* const* inputs, const double* weights,
                              std::size_t group, std::size_t begin, std::size_t n, bool first) {
  for (std::size_t j = 0; j < n; j += kStep) {
    Vd s[4];
    std::size_t i = 0;
    if (first) {
      const auto* x = static_cast<const typename T::Word*>(inputs[0]) + begin + j;
      for (std::size_t v = 0; v < 4; ++v) {
        s[v] = __builtin_convertvector(T::read(x + v * kLanes), Vd) * weights[0];
      }
      i = 1;
    } else {
      for (std::size_t v = 0; v < 4; ++v) {
        s[v] = load<Vd>(sum + j + v * kLanes);
      }
    }
    for (; i < group; ++i) {
      const auto* x = static_cast<const typename T::Word*>(inputs[i]) + begin + j;
      const Vd w = Vd{} + weights[i];
      for (std::size_t v = 0; v < 4; ++v) {
        s[v] = multiply_add(__builtin_convertvector(T::read(x + v * kLanes), Vd), w, s[v]);
      }
    }
    for (std::size_t v = 0; v < 4; ++v) {
      store(sum + j + v * kLanes, s[v]);
    }
  }
}

// Products of a weight (24 bits) and an element (at most 24 bits) are exact in binary64, so a fused
// multiply-add gives the bits of a separate one.
template <typename T>
FEDCORE_INLINE bool mean_of(const void* const* inputs, const double* weights, std::size_t k,
                            double total, void* out, std::size_t count) {
  alignas(64) double sum[kBlock];
  auto* result = static_cast<typename T::Word*>(out);
  const Vd divisor = Vd{} + total;
  const Vd reciprocal = 1.0 / divisor;
  Vd zero = Vd{};         // stays 0 unless a sum is not finite
  std::uint64_t bad = 0;  // the same for the elements that fill no vector
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t n = count - begin < kBlock ? count - begin : kBlock;
    const std::size_t whole = n / kStep * kStep;
    for (std::size_t g = 0; g < k; g += kGroup) {
      const std::size_t group = k - g < kGroup ? k - g : kGroup;
      add_group<T>(sum, inputs + g, weights + g, group, begin, whole, g == 0);
    }
    for (std::size_t j = 0; j < whole; j += kLanes) {
      const Vd s = load<Vd>(sum + j);
      zero += s - s;
      store(sum + j, divide(s, divisor, reciprocal));
    }
    T::write(result + begin, sum, whole);
    for (std::size_t j = begin + whole; j < begin + n; ++j) {
      result[j] = T::encode(arith::mean_element<T>(inputs, weights, k, total, j, bad));
    }
  }
  double lanes = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    lanes += zero[lane];
  }
  return lanes == 0 && bad == 0;
}

// One more input on sums that lie in memory: the additions of mean_of, one input at a time.
template <typename T>
FEDCORE_INLINE void fold_of(const void* input, double weight, bool first, double* sums,
                            std::size_t count) {
  const std::size_t whole = count / kStep * kStep;
  add_group<T>(sums, &input, &weight, 1, 0, whole, first);
  for (std::size_t j = whole; j < count; ++j) {
    const double product = weight * arith::element<T>(&input, 0, j);
    sums[j] = first ? product : sums[j] + product;
  }
}

template <typename T>
FEDCORE_INLINE void finish_of(const double* sums, double total, void* out, std::size_t count) {
  alignas(64) double mean[kBlock];
  auto* result = static_cast<typename T::Word*>(out);
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t n = count - begin < kBlock ? count - begin : kBlock;
    for (std::size_t j = 0; j < n; ++j) {
      mean[j] = sums[begin + j] / total;
    }
    const std::size_t whole = n / kStep * kStep;
    T::write(result + begin, mean, whole);
    for (std::size_t j = whole; j < n; ++j) {
      result[begin + j] = T::encode(mean[j]);
    }
  }
}

void fold_f32(const void* input, double weight, bool first, double* sums, std::size_t count) {
  fold_of<F32>(input, weight, first, sums, count);
}

void fold_bf16(const void* input, double weight, bool first, double* sums, std::size_t count) {
  fold_of<Bf16>(input, weight, first, sums, count);
}

void fold_f16(const void* input, double weight, bool first, double* sums, std::size_t count) {
  fold_of<F16>(input, weight, first, sums, count);
}

void finish_f32(const double* sums, double total, void* out, std::size_t count) {
  finish_of<F32>(sums, total, out, count);
}

void finish_bf16(const double* sums, double total, void* out, std::size_t count) {
  finish_of<Bf16>(sums, total, out, count);
}

void finish_f16(const double* sums, double total, void* out, std::size_t count) {
  finish_of<F16>(sums, total, out, count);
}

bool mean_f32(const void* const* inputs, const double* weights, std::size_t k, double total,
              void* out, std::size_t count) {
  return mean_of<F32>(inputs, weights, k, total, out, count);
}

bool mean_bf16(const void* const* inputs, const double* weights, std::size_t k, double total,
               void* out, std::size_t count) {
  return mean_of<Bf16>(inputs, weights, k, total, out, count);
}

bool mean_f16(const void* const* inputs, const double* weights, std::size_t k, double total,
              void* out, std::size_t count) {
  return mean_of<F16>(inputs, weights, k, total, out, count);
}

// --- F64 ---

struct F64 : arith::F64 {
  typedef UnalignedU64 Word;
};

bool mean_f64(const void* const* inputs, const double* weights, std::size_t k, double total,
              void* out, std::size_t count) {
  alignas(64) double sum[kBlock];
  alignas(64) double rest[kBlock];
  std::uint64_t bad = 0;
  auto* result = static_cast<UnalignedU64*>(out);
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t n = count - begin < kBlock ? count - begin : kBlock;
    for (std::size_t j = 0; j < n; ++j) {
      sum[j] = rest[j] = -0.0;
    }
    for (std::size_t i = 0; i < k; ++i) {
      const auto* x = static_cast<const UnalignedU64*>(inputs[i]) + begin;
      for (std::size_t j = 0; j < n; ++j) {
        arith::add_exact(sum[j], rest[j], weights[i], F64::decode(x[j]));
      }
    }
    for (std::size_t j = 0; j < n; ++j) {
      double value = arith::divide_pair(sum[j], rest[j], total);
      if (arith::non_finite(value)) {
        value = arith::mean_element<F64>(inputs, weights, k, total, begin + j, bad);
      }
      result[begin + j] = F64::encode(value);
    }
  }
  return bad == 0;
}

// Four sums an element: the pair, and the pair of the values scaled as mean_element scales them.
void fold_f64(const void* input, double weight, bool first, double* sums, std::size_t count) {
  for (std::size_t j = 0; j < count; ++j) {
    double* s = sums + 4 * j;
    if (first) {
      s[0] = s[1] = s[2] = s[3] = -0.0;
    }
    const double value = arith::element<F64>(&input, 0, j);
    arith::add_exact(s[0], s[1], weight, value);
    arith::add_exact(s[2], s[3], weight, value * 0x1p-100);
  }
}

void finish_f64(const double* sums, double total, void* out, std::size_t count) {
  auto* result = static_cast<UnalignedU64*>(out);
  for (std::size_t j = 0; j < count; ++j) {
    const double* s = sums + 4 * j;
    double value = arith::divide_pair(s[0], s[1], total);
    if (arith::non_finite(value)) {
      value = arith::divide_pair(s[2], s[3], total) * 0x1p100;
    }
    result[j] = F64::encode(value);
  }
}
