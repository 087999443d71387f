// The loop bodies. Included once per instruction set by kernels.cpp, inside a namespace of its own
// and a target region; FEDCORE_F16C says whether the F16C and FMA instructions may be used,
// FEDCORE_LANES how many binary64 values a register holds. Only plain functions of this file and
// builtins appear here, so that no function of the library is compiled for the wrong target.

inline double load_f32(const UnalignedU32* p) {
  float value;
  const std::uint32_t bits = *p;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline float bf16_to_float(std::uint32_t bits) {
  bits <<= 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Exponent and fraction move into place and a multiplication by 2^112 corrects the bias; it is
// exact and makes subnormals right. Infinity and NaN get their exponent back.
inline float half_to_float(std::uint32_t half) {
  const std::uint32_t magnitude = (half & 0x7FFF) << 13;
  float value;
  __builtin_memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits |= (magnitude >= 0x0F800000 ? 0x7F800000u : 0u) | ((half & 0x8000) << 16);
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Rounds to binary32 "to odd": an inexact result has its last bit set. Rounding that once more to a
// format at least two bits narrower gives what rounding directly would (Boldo and Melquiond 2008).
inline std::uint32_t to_odd_float_bits(double value) {
  const float nearest = static_cast<float>(value);
  std::uint32_t bits;
  __builtin_memcpy(&bits, &nearest, 4);
  const double back = nearest;
  bits -= __builtin_fabs(back) > __builtin_fabs(value) ? 1u : 0u;
  bits |= back != value ? 1u : 0u;
  return bits;
}

inline std::uint16_t to_bf16(double value) {
  const std::uint32_t bits = to_odd_float_bits(value);
  return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline std::uint16_t to_half(double value) {
  const std::uint32_t bits = to_odd_float_bits(value);
  const std::uint32_t magnitude = bits & 0x7FFFFFFF;
  const std::uint32_t normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 the result is subnormal: adding 1/2 lines the bits up with half's last place and
  // rounds.
  float small;
  __builtin_memcpy(&small, &magnitude, 4);
  small += 0.5f;
  std::uint32_t subnormal;
  __builtin_memcpy(&subnormal, &small, 4);
  subnormal -= 0x3F000000;
  const std::uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  return static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000));
}

// NaN or infinity in one accumulator, as a mask that loops can collect without branching.
inline std::uint64_t non_finite(double value) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, &value, 8);
  return (bits & 0x7FF0000000000000u) == 0x7FF0000000000000u ? 1 : 0;
}

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

// The integer lanes of means rounded to binary32 "to odd", as by to_odd_float_bits above. The bits
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
struct F32 {
  typedef UnalignedU32 Word;
  static FEDCORE_INLINE Vf read(const Word* from) { return load<Vf>(from); }
  static FEDCORE_INLINE void write(Word* to, const double* from, std::size_t n) {
    for (std::size_t j = 0; j < n; j += kLanes) {
      store(to + j, __builtin_convertvector(load<Vd>(from + j), Vf));
    }
  }
  static FEDCORE_INLINE double read_one(const Word* from) { return load_f32(from); }
  static FEDCORE_INLINE void write_one(Word* to, double value) {
    *to = bits_as<std::uint32_t>(static_cast<float>(value));
  }
};

struct Bf16 {
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
      to[j] = to_bf16(from[j]);
    }
  }
  static FEDCORE_INLINE double read_one(const Word* from) { return bf16_to_float(*from); }
  static FEDCORE_INLINE void write_one(Word* to, double value) { *to = to_bf16(value); }
};

struct F16 {
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
      to[j] = to_half(from[j]);
    }
  }
  static FEDCORE_INLINE double read_one(const Word* from) { return half_to_float(*from); }
  static FEDCORE_INLINE void write_one(Word* to, double value) { *to = to_half(value); }
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
  Vd zero = Vd{};  // stays 0 unless a sum is not finite
  double tail_zero = 0;
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
      double s = weights[0] * T::read_one(static_cast<const typename T::Word*>(inputs[0]) + j);
      for (std::size_t i = 1; i < k; ++i) {
        s += weights[i] * T::read_one(static_cast<const typename T::Word*>(inputs[i]) + j);
      }
      tail_zero += s - s;
      T::write_one(result + j, s / total);
    }
  }
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    tail_zero += zero[lane];
  }
  return tail_zero == 0;
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

inline double load_f64(const UnalignedU64* p, double scale) {
  double value;
  const std::uint64_t bits = *p;
  __builtin_memcpy(&value, &bits, 8);
  return value * scale;
}

// Adds w * x to the pair (sum, rest). x splits into 26 leading bits and the rest, so both products
// with a 24-bit weight are exact. The sign of a zero is kept, here and below: models of -0.0
// average to -0.0.
inline void add_exact(double& sum, double& rest, double w, double x) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  bits &= ~((std::uint64_t{1} << 27) - 1);
  double head;
  __builtin_memcpy(&head, &bits, 8);
  const double parts[2] = {w * head, w * __builtin_copysign(x - head, x)};
  for (const double part : parts) {
    const double next = sum + part;
    const double virtual_part = next - sum;
    rest += (sum - (next - virtual_part)) + (part - virtual_part);
    sum = next;
  }
}

inline double divide_pair(double sum, double rest, double total) {
  const double high = rest == 0 ? sum : sum + rest;
  const double low = rest - (high - sum);
  const double quotient = high / total;
  const double remainder = __builtin_fma(-quotient, total, high) + low;
  return remainder == 0 ? quotient : quotient + remainder / total;
}

inline double mean_one_f64(const void* const* inputs, const double* weights, std::size_t k,
                           double total, std::size_t j, double scale) {
  double sum = 0, rest = 0;
  for (std::size_t i = 0; i < k; ++i) {
    add_exact(sum, rest, weights[i],
              load_f64(static_cast<const UnalignedU64*>(inputs[i]) + j, scale));
  }
  return divide_pair(sum, rest, total);
}

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
        add_exact(sum[j], rest[j], weights[i], load_f64(x + j, 1.0));
      }
    }
    for (std::size_t j = 0; j < n; ++j) {
      double value = divide_pair(sum[j], rest[j], total);
      if (non_finite(
              value)) {  // an input is, or the sum left the range: 2^-100 leaves room for any
        value = mean_one_f64(inputs, weights, k, total, begin + j, 0x1p-100) * 0x1p100;
        bad |= non_finite(value);
      }
      std::uint64_t bits;
      __builtin_memcpy(&bits, &value, 8);
      result[begin + j] = bits;
    }
  }
  return bad == 0;
}
