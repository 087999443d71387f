// The loop bodies of the means. Included once per instruction set by kernels.cpp, inside a
// namespace of its own and a target region; FEDCORE_F16C says whether the F16C and FMA instructions
// may be used, FEDCORE_LANES how many binary64 values a register holds. Only plain functions of
// this file, the always inlined ones of arith.hpp and builtins appear here, so that no function of
// the library is compiled for the wrong target.

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
static_assert(kBlock % kStep == 0 && kPiece % kStep == 0);

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

#if FEDCORE_F16C && FEDCORE_LANES == 4
FEDCORE_INLINE __m128i low_halves(__m256d lanes) {
  return _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(_mm256_castpd256_pd128(lanes)),
                                         _mm_castpd_ps(_mm256_extractf128_pd(lanes, 1)), 0x88));
}
#endif

// Rounded to binary32 "to odd", as by arith::to_odd_float_bits. The bits of a larger magnitude are
// the larger integer where signs are equal.
FEDCORE_INLINE Vu odd_bits(Vd value) {
#if FEDCORE_LANES == 8
  const auto nearest = bits_as<__m256>(__builtin_convertvector(value, Vf));
  const auto back = bits_as<__m512d>(__builtin_convertvector(bits_as<Vf>(nearest), Vd));
  const auto exact = bits_as<__m512d>(value);
  const __mmask8 grew =
      _mm512_cmpgt_epi64_mask(_mm512_castpd_si512(back), _mm512_castpd_si512(exact));
  const __mmask8 inexact = _mm512_cmp_pd_mask(back, exact, _CMP_NEQ_UQ);
  const __m256i one = _mm256_set1_epi32(1);
  __m256i bits = _mm256_castps_si256(nearest);
  bits = _mm256_mask_sub_epi32(bits, grew, bits, one);
  return bits_as<Vu>(_mm256_mask_or_epi32(bits, inexact, bits, one));
#elif FEDCORE_F16C
  const auto exact = bits_as<__m256d>(value);
  const __m128 nearest = _mm256_cvtpd_ps(exact);
  const __m256d back = _mm256_cvtps_pd(nearest);
  const __m256d grew = _mm256_castsi256_pd(
      _mm256_cmpgt_epi64(_mm256_castpd_si256(back), _mm256_castpd_si256(exact)));
  const __m256d inexact = _mm256_cmp_pd(back, exact, _CMP_NEQ_UQ);
  const __m128i bits = _mm_add_epi32(_mm_castps_si128(nearest), low_halves(grew));
  return bits_as<Vu>(_mm_or_si128(bits, _mm_and_si128(low_halves(inexact), _mm_set1_epi32(1))));
#else
  const Vf nearest = __builtin_convertvector(value, Vf);
  const Vd back = __builtin_convertvector(nearest, Vd);
  const Vl magnitude = Vl{} + INT64_MAX;
  const auto grew =
      bits_as<Vd>(bits_as<Vl>(back) & magnitude) > bits_as<Vd>(bits_as<Vl>(value) & magnitude);
  const Vu bits = bits_as<Vu>(nearest) + __builtin_convertvector(grew, Vu);
  return bits | (__builtin_convertvector(back != value, Vu) & 1);
#endif
}

// A register of binary32 lanes, twice as many as binary64 ones, and of their bits.
typedef float Wf __attribute__((vector_size(8 * FEDCORE_LANES)));
typedef std::uint32_t Wu __attribute__((vector_size(8 * FEDCORE_LANES)));
typedef std::uint16_t Wh __attribute__((vector_size(8 * FEDCORE_LANES)));

FEDCORE_INLINE Wf both_of(Vf lower, Vf upper) {
#if FEDCORE_LANES == 8
  return bits_as<Wf>(_mm512_insertf32x8(_mm512_castps256_ps512(bits_as<__m256>(lower)),
                                        bits_as<__m256>(upper), 1));
#elif FEDCORE_F16C
  return bits_as<Wf>(_mm256_set_m128(bits_as<__m128>(upper), bits_as<__m128>(lower)));
#else
  Wf both;
  __builtin_memcpy(&both, &lower, sizeof lower);
  __builtin_memcpy(reinterpret_cast<char*>(&both) + sizeof lower, &upper, sizeof upper);
  return both;
#endif
}

// What sums are made means with. A lane of `zero` stays 0 unless a mean of its own is not finite.
struct Division {
  Vd total;
  Vd reciprocal;
  Wf zero = Wf{};

  FEDCORE_INLINE explicit Division(double sum_of_weights)
      : total(Vd{} + sum_of_weights), reciprocal(1.0 / total) {}

  FEDCORE_INLINE Vd exactly(Vd sum) const { return divide(sum, total, reciprocal); }

  // Quotients in binary32, within half a unit in the last place and a hair of the exact ones. Where
  // such a number is not on the border between two of a narrower format, it rounds as the exact
  // one.
  FEDCORE_INLINE Wf nearly(Vd lower, Vd upper) {
    const Wf mean = both_of(__builtin_convertvector(lower * reciprocal, Vf),
                            __builtin_convertvector(upper * reciprocal, Vf));
    look_at(mean);
    return mean;
  }

  // Exact quotients rounded "to odd", which round to a narrower format as the quotients do.
  FEDCORE_INLINE Wf to_odd(Vd lower, Vd upper) const {
    return both_of(bits_as<Vf>(odd_bits(exactly(lower))), bits_as<Vf>(odd_bits(exactly(upper))));
  }

  FEDCORE_INLINE void look_at(Wf mean) {
#if FEDCORE_LANES == 8
    zero = bits_as<Wf>(
        _mm512_fmadd_ps(bits_as<__m512>(mean), _mm512_setzero_ps(), bits_as<__m512>(zero)));
#elif FEDCORE_F16C
    zero = bits_as<Wf>(
        _mm256_fmadd_ps(bits_as<__m256>(mean), _mm256_setzero_ps(), bits_as<__m256>(zero)));
#else
    zero += mean * 0.0f;
#endif
  }

  FEDCORE_INLINE bool all_finite() const {
    float sum = 0;
    for (std::size_t lane = 0; lane < 2 * kLanes; ++lane) {
      sum += zero[lane];
    }
    return sum == 0;
  }
};

FEDCORE_INLINE bool any_zero(Wh lanes) {
#if FEDCORE_LANES == 8
  const auto bits = bits_as<__m512i>(lanes);
  return _mm512_testn_epi16_mask(bits, bits) != 0;
#elif FEDCORE_F16C
  return _mm256_movemask_epi8(
             _mm256_cmpeq_epi16(bits_as<__m256i>(lanes), _mm256_setzero_si256())) != 0;
#else
  std::uint64_t parts[sizeof lanes / sizeof(std::uint64_t)];
  const auto zeros = lanes == 0;
  __builtin_memcpy(parts, &zeros, sizeof parts);
  std::uint64_t found = 0;
  for (const std::uint64_t part : parts) {
    found |= part;
  }
  return found != 0;
#endif
}

// To binary64 a register's halves convert in two operations, or one where they come from memory.
FEDCORE_INLINE const void* in_memory(Wf* floats) {
#if FEDCORE_F16C
  asm("" : "+m"(*reinterpret_cast<Wf(*)[2]>(floats)));
#endif
  return floats;
}

FEDCORE_INLINE void store_steps(double* to, const Vd* values) {
  for (std::size_t v = 0; v < 4; ++v) {
    store(to + v * kLanes, values[v]);
  }
}

// How the elements of a step become floats, which hold each of them exactly, and how a step's sums
// become elements. The order of the sums is the dtype's own; kSplit: another one than that of the elements.
struct F32 : arith::F32 {
  typedef UnalignedU32 Word;
  static constexpr bool kSplit = false;
  static FEDCORE_INLINE const void* read(const Word* from, Wf*) { return from; }
  static FEDCORE_INLINE void write(Word* to, const Vd* sum, Division& by) {
    for (std::size_t v = 0; v < 4; v += 2) {
      const Wf mean = both_of(__builtin_convertvector(by.exactly(sum[v]), Vf),
                              __builtin_convertvector(by.exactly(sum[v + 1]), Vf));
      by.look_at(mean);
      store(to + v * kLanes, mean);
    }
  }
  static FEDCORE_INLINE void write_wide(double* to, const Vd* mean) { store_steps(to, mean); }
};

// In the order of elements 0, 2, 4 and so on, then 1, 3, 5: the lower and the upper halves of
// 32-bit lanes.
struct Bf16 : arith::Bf16 {
  typedef UnalignedU16 Word;
  static constexpr bool kSplit = true;
  static constexpr std::uint32_t kUpper = 0xFFFF0000;
  static FEDCORE_INLINE const void* read(const Word* from, Wf* to) {
    const auto pairs = load<Wu>(from);
    to[0] = bits_as<Wf>(pairs << 16);
    to[1] = bits_as<Wf>(pairs & kUpper);
    return in_memory(to);
  }
  static FEDCORE_INLINE void write(Word* to, const Vd* sum, Division& by) {
    // Half a unit more and cut off is rounded to nearest; where nothing is cut off, it may be a
    // tie.
    Wu even = bits_as<Wu>(by.nearly(sum[0], sum[1])) + 0x8000;
    Wu odd = bits_as<Wu>(by.nearly(sum[2], sum[3])) + 0x8000;
    if (any_zero(bits_as<Wh>((even & 0xFFFF) | (odd << 16)))) {
      even = ties_to_even(bits_as<Wu>(by.to_odd(sum[0], sum[1])));
      odd = ties_to_even(bits_as<Wu>(by.to_odd(sum[2], sum[3])));
    }
    store(to, (even >> 16) | (odd & kUpper));
  }
  static FEDCORE_INLINE void write_wide(double* to, const Vd* mean) {
    alignas(64) double lanes[kStep];
    store_steps(lanes, mean);
    for (std::size_t i = 0; i < kStep / 2; ++i) {
      to[2 * i] = lanes[i];
      to[2 * i + 1] = lanes[kStep / 2 + i];
    }
  }

 private:
  static FEDCORE_INLINE Wu ties_to_even(Wu bits) { return bits + 0x7FFF + ((bits >> 16) & 1); }
};

struct F16 : arith::F16 {
  typedef UnalignedU16 Word;
  static constexpr bool kSplit = false;
  static FEDCORE_INLINE void write_wide(double* to, const Vd* mean) { store_steps(to, mean); }
#if FEDCORE_F16C
  static FEDCORE_INLINE const void* read(const Word* from, Wf* to) {
    to[0] = widen(from);
    to[1] = widen(from + 2 * kLanes);
    return in_memory(to);
  }
  static FEDCORE_INLINE void write(Word* to, const Vd* sum, Division& by) {
    for (std::size_t v = 0; v < 4; v += 2) {
      const Wf mean = by.nearly(sum[v], sum[v + 1]);
      // No border lies between two numbers that round to the same one.
      auto rounded = narrow(mean * (1 - 0x1p-23f));
      if (differ(rounded, narrow(mean * (1 + 0x1p-23f)))) {
        rounded = narrow(by.to_odd(sum[v], sum[v + 1]));
      }
      store(to + v * kLanes, rounded);
    }
  }

 private:
#if FEDCORE_LANES == 8
  static FEDCORE_INLINE Wf widen(const Word* from) {
    return bits_as<Wf>(_mm512_maskz_cvtph_ps(0xFFFF, load<__m256i>(from)));
  }
  static FEDCORE_INLINE __m256i narrow(Wf values) {
    return _mm512_maskz_cvtps_ph(0xFFFF, bits_as<__m512>(values), 0);
  }
  static FEDCORE_INLINE bool differ(__m256i a, __m256i b) {
    return _mm256_cmpneq_epi16_mask(a, b) != 0;
  }
#else
  static FEDCORE_INLINE Wf widen(const Word* from) {
    return bits_as<Wf>(_mm256_cvtph_ps(load<__m128i>(from)));
  }
  static FEDCORE_INLINE __m128i narrow(Wf values) {
    return _mm256_cvtps_ph(bits_as<__m256>(values), 0);
  }
  static FEDCORE_INLINE bool differ(__m128i a, __m128i b) {
    return _mm_movemask_epi8(_mm_cmpeq_epi16(a, b)) != 0xFFFF;
  }
#endif
#else
  static FEDCORE_INLINE const void* read(const Word* from, Wf* to) {
    for (std::size_t v = 0; v < 4; ++v) {
      const Vu half = __builtin_convertvector(load<Vh>(from + v * kLanes), Vu);
      const Vu magnitude = (half & 0x7FFF) << 13;
      const Vu small = bits_as<Vu>(bits_as<Vf>(magnitude + 0x38800000) - 0x1p-14f);
      const Vu special = bits_as<Vu>(magnitude >= 0x0F800000) & 0x38000000;
      const Vu subnormal = bits_as<Vu>(magnitude < 0x00800000);
      const Vu wide = magnitude + 0x38000000 + special;
      store(reinterpret_cast<Vf*>(to) + v,
            (small & subnormal) | (wide & ~subnormal) | ((half & 0x8000) << 16));
    }
    return to;
  }
  static FEDCORE_INLINE void write(Word* to, const Vd* sum, Division& by) {
    for (std::size_t v = 0; v < 4; v += 2) {
      const Vd lower = by.exactly(sum[v]), upper = by.exactly(sum[v + 1]);
      by.look_at(both_of(__builtin_convertvector(lower, Vf), __builtin_convertvector(upper, Vf)));
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        to[v * kLanes + lane] = encode(lower[lane]);
        to[(v + 1) * kLanes + lane] = encode(upper[lane]);
      }
    }
  }
#endif
};

// Inputs come from other cores' caches or from memory, and the prefetcher of the processor stops at
// the end of each page: what is this far ahead is asked for, where a step takes whole lines. At the
// baseline the arithmetic takes longer than the bytes.
constexpr std::size_t kAhead = 4096;
constexpr std::size_t kLine = 64;

template <typename T>
FEDCORE_INLINE void widen_step(const void* input, std::size_t at, Vd* x) {
  const auto* words = static_cast<const typename T::Word*>(input) + at;
  if constexpr (FEDCORE_F16C && kStep * sizeof *words >= kLine) {
    const auto* ahead = reinterpret_cast<const char*>(words) + kAhead;
    for (std::size_t line = 0; line < kStep * sizeof *words; line += kLine) {
      __builtin_prefetch(ahead + line);
    }
  }
  Wf kept[2];
  const auto* floats = static_cast<const float*>(T::read(words, kept));
  for (std::size_t v = 0; v < 4; ++v) {
    x[v] = __builtin_convertvector(load<Vf>(floats + v * kLanes), Vd);
  }
}

// sum[j] = or += the weighted inputs of one group, in order; the sums stay in registers meanwhile.
template <typename T>
FEDCORE_INLINE void add_group(double* sum, const void* const* inputs, const double* weights,
                              std::size_t group, std::size_t begin, std::size_t n, bool first) {
  for (std::size_t j = 0; j < n; j += kStep) {
    Vd s[4], x[4];
    std::size_t i = 0;
    if (first) {
      widen_step<T>(inputs[0], begin + j, x);
      for (std::size_t v = 0; v < 4; ++v) {
        s[v] = x[v] * weights[0];
      }
      i = 1;
    } else {
      for (std::size_t v = 0; v < 4; ++v) {
        s[v] = load<Vd>(sum + j + v * kLanes);
      }
    }
    for (; i < group; ++i) {
      widen_step<T>(inputs[i], begin + j, x);
      const Vd w = Vd{} + weights[i];
      for (std::size_t v = 0; v < 4; ++v) {
        s[v] = multiply_add(x[v], w, s[v]);
      }
    }
    for (std::size_t v = 0; v < 4; ++v) {
      store(sum + j + v * kLanes, s[v]);
    }
  }
}

// The means of whole steps of sums.
template <typename T>
FEDCORE_INLINE void divide_sums(const double* sum, std::size_t n, typename T::Word* out,
                                Division& by) {
  for (std::size_t j = 0; j < n; j += kStep) {
    Vd s[4];
    for (std::size_t v = 0; v < 4; ++v) {
      s[v] = load<Vd>(sum + j + v * kLanes);
    }
    T::write(out + j, s, by);
  }
}

// To binary64, in one operation.
FEDCORE_INLINE Vd widened(Vf value) {
#if FEDCORE_LANES == 8
  return bits_as<Vd>(_mm512_maskz_cvtps_pd(0xFF, bits_as<__m256>(value)));
#elif FEDCORE_F16C
  return bits_as<Vd>(_mm256_cvtps_pd(bits_as<__m128>(value)));
#else
  return __builtin_convertvector(value, Vd);
#endif
}

FEDCORE_INLINE Vu widened_words(const void* from) {
#if FEDCORE_LANES == 8
  return bits_as<Vu>(_mm256_cvtepu16_epi32(load<__m128i>(from)));
#elif FEDCORE_F16C
  return bits_as<Vu>(_mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load<Vh>(from), Vu);
#endif
}

// The elements of a step in their own order.
template <typename T>
FEDCORE_INLINE void widen_in_order(const void* input, std::size_t at, Vd* x) {
  if constexpr (T::kSplit) {
    const auto* words = static_cast<const typename T::Word*>(input) + at;
#if FEDCORE_F16C
    __builtin_prefetch(reinterpret_cast<const char*>(words) + kAhead);
#endif
    for (std::size_t v = 0; v < 4; ++v) {
      const Vu bits = widened_words(words + v * kLanes) << 16;
      x[v] = widened(bits_as<Vf>(bits));
    }
  } else {
    widen_step<T>(input, at, x);
  }
}

// The means in binary64, in the order of the elements. Where there are many inputs, `out` holds the sums
// of a block between one group of them and the next.
template <typename T>
FEDCORE_INLINE bool mean_wide_of(const void* const* inputs, const double* weights, std::size_t k,
                                 double total, double* out, std::size_t count) {
  const Division by(total);
  Vd zero = Vd{};  // a lane stays 0 unless a mean of its own is not finite
  const std::size_t whole = count / kStep * kStep;
  for (std::size_t begin = 0; begin < whole; begin += kBlock) {
    const std::size_t end = whole - begin < kBlock ? whole : begin + kBlock;
    for (std::size_t g = 0; g < k; g += kGroup) {
      const std::size_t last = k - g < kGroup ? k : g + kGroup;
      for (std::size_t j = begin; j < end; j += kStep) {
        Vd s[4], x[4];
        std::size_t i = g;
        if (g == 0) {
          widen_in_order<T>(inputs[0], j, x);
          for (std::size_t v = 0; v < 4; ++v) {
            s[v] = x[v] * weights[0];
          }
          i = 1;
        } else {
          for (std::size_t v = 0; v < 4; ++v) {
            s[v] = load<Vd>(out + j + v * kLanes);
          }
        }
        for (; i < last; ++i) {
          widen_in_order<T>(inputs[i], j, x);
          const Vd w = Vd{} + weights[i];
          for (std::size_t v = 0; v < 4; ++v) {
            s[v] = multiply_add(x[v], w, s[v]);
          }
        }
        for (std::size_t v = 0; v < 4; ++v) {
          if (last == k) {
            s[v] = by.exactly(s[v]);
            zero = multiply_add(s[v], Vd{}, zero);
          }
          store(out + j + v * kLanes, s[v]);
        }
      }
    }
  }
  double found = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    found += zero[lane];
  }
  std::uint64_t bad = 0;
  for (std::size_t j = whole; j < count; ++j) {
    out[j] = arith::mean_element<T>(arith::Elements<T>{inputs}, weights, k, total, j, bad);
  }
  return found == 0 && bad == 0;
}

// Products of a weight (24 bits) and an element (at most 24 bits) are exact in binary64, so a fused
// multiply-add gives the bits of a separate one.
template <typename T>
FEDCORE_INLINE bool mean_of(const void* const* inputs, const double* weights, std::size_t k,
                            double total, void* out, std::size_t count) {
  alignas(64) double sum[kBlock];
  auto* result = static_cast<typename T::Word*>(out);
  Division by(total);
  std::uint64_t bad = 0;  // an element that fills no step is not finite
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t n = count - begin < kBlock ? count - begin : kBlock;
    const std::size_t whole = n / kStep * kStep;
    for (std::size_t g = 0; g < k; g += kGroup) {
      const std::size_t group = k - g < kGroup ? k - g : kGroup;
      add_group<T>(sum, inputs + g, weights + g, group, begin, whole, g == 0);
    }
    divide_sums<T>(sum, whole, result + begin, by);
    for (std::size_t j = begin + whole; j < begin + n; ++j) {
      result[j] =
          T::encode(arith::mean_element<T>(arith::Elements<T>{inputs}, weights, k, total, j, bad));
    }
  }
  return by.all_finite() && bad == 0;
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
  auto* result = static_cast<typename T::Word*>(out);
  Division by(total);
  const std::size_t whole = count / kStep * kStep;
  divide_sums<T>(sums, whole, result, by);
  for (std::size_t j = whole; j < count; ++j) {
    result[j] = T::encode(sums[j] / total);
  }
}

// The same before the rounding to T, in the order of the elements.
template <typename T>
FEDCORE_INLINE void finish_wide_of(const double* sums, double total, double* out,
                                   std::size_t count) {
  const Division by(total);
  const std::size_t whole = count / kStep * kStep;
  for (std::size_t j = 0; j < whole; j += kStep) {
    Vd mean[4];
    for (std::size_t v = 0; v < 4; ++v) {
      mean[v] = by.exactly(load<Vd>(sums + j + v * kLanes));
    }
    T::write_wide(out + j, mean);
  }
  for (std::size_t j = whole; j < count; ++j) {
    out[j] = sums[j] / total;
  }
}

bool wide_f32(const void* const* inputs, const double* weights, std::size_t k, double total,
              double* out, std::size_t count) {
  return mean_wide_of<F32>(inputs, weights, k, total, out, count);
}

bool wide_bf16(const void* const* inputs, const double* weights, std::size_t k, double total,
               double* out, std::size_t count) {
  return mean_wide_of<Bf16>(inputs, weights, k, total, out, count);
}

bool wide_f16(const void* const* inputs, const double* weights, std::size_t k, double total,
              double* out, std::size_t count) {
  return mean_wide_of<F16>(inputs, weights, k, total, out, count);
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

void finish_wide_f32(const double* sums, double total, double* out, std::size_t count) {
  finish_wide_of<F32>(sums, total, out, count);
}

void finish_wide_bf16(const double* sums, double total, double* out, std::size_t count) {
  finish_wide_of<Bf16>(sums, total, out, count);
}

void finish_wide_f16(const double* sums, double total, double* out, std::size_t count) {
  finish_wide_of<F16>(sums, total, out, count);
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
        value = arith::mean_element<F64>(arith::Elements<F64>{inputs}, weights, k, total, begin + j,
                                         bad);
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
