// The loop bodies that add decoded differences to the base they were made from. Included right
// after kernels.inl, once per instruction set, with what is said there.

// One element after the other; what vectors there are, the compiler finds.
template <typename T>
FEDCORE_INLINE void add_rest(const void* base, const float* differences, void* out,
                             std::size_t begin, std::size_t count) {
  for (std::size_t j = begin; j < count; ++j) {
    double value = differences[j];
    value = base != nullptr ? arith::element<T>(&base, 0, j) + value : value;
    const auto word = T::encode(arith::limited<T>(value));
    __builtin_memcpy(static_cast<char*>(out) + j * sizeof word, &word, sizeof word);
  }
}

#if FEDCORE_F16C
FEDCORE_INLINE Vf lanes_of(const Bf16::Word* from) {
#if FEDCORE_LANES == 8
  return bits_as<Vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
#else
  return bits_as<Vf>(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadu_si64(from)), 16));
#endif
}

FEDCORE_INLINE Vf half_lanes_of(const F16::Word* from) {
#if FEDCORE_LANES == 8
  return bits_as<Vf>(_mm256_cvtph_ps(load<__m128i>(from)));
#else
  return bits_as<Vf>(_mm_cvtph_ps(_mm_loadu_si64(from)));
#endif
}

// Binary32 numbers rounded "to odd", as elements.
FEDCORE_INLINE void store_bf16(Bf16::Word* to, Vu odd) {
  const Vu rounded = (odd + 0x7FFF + ((odd >> 16) & 1)) >> 16;
#if FEDCORE_LANES == 8
  store(to, _mm256_cvtepi32_epi16(bits_as<__m256i>(rounded)));
#else
  const auto wide = bits_as<__m128i>(rounded);
  _mm_storeu_si64(to, _mm_packus_epi32(wide, wide));
#endif
}

FEDCORE_INLINE void store_f16(F16::Word* to, Vu odd) {
#if FEDCORE_LANES == 8
  store(to, _mm256_cvtps_ph(bits_as<__m256>(odd), 0));
#else
  _mm_storeu_si64(to, _mm_cvtps_ph(bits_as<__m128>(odd), 0));
#endif
}

FEDCORE_INLINE Vd limited(Vd value, double limit) {
  const Vd most = Vd{} + limit;
  value = value > most ? most : value;
  return value < -most ? -most : value;
}
#endif

void add_f64(const void* base, const float* differences, void* out, std::size_t count) {
  add_rest<F64>(base, differences, out, 0, count);
}

// A sum of two binary32 numbers that is rounded to binary64 first has the same bits: that format is
// more than twice as precise.
void add_f32(const void* base, const float* differences, void* out, std::size_t count) {
  constexpr std::size_t kFloats = 2 * kLanes;
  const auto* from = static_cast<const F32::Word*>(base);
  const Wf most = Wf{} + static_cast<float>(F32::largest());
  std::size_t j = 0;
  for (; from != nullptr && j + kFloats <= count; j += kFloats) {
    Wf sum = load<Wf>(from + j) + load<Wf>(differences + j);
    sum = sum > most ? most : sum;
    sum = sum < -most ? -most : sum;
    store(static_cast<F32::Word*>(out) + j, sum);
  }
  add_rest<F32>(base, differences, out, j, count);
}

void add_bf16(const void* base, const float* differences, void* out, std::size_t count) {
  std::size_t j = 0;
#if FEDCORE_F16C
  const auto* from = static_cast<const Bf16::Word*>(base);
  for (; from != nullptr && j + kLanes <= count; j += kLanes) {
    const Vd sum = __builtin_convertvector(lanes_of(from + j), Vd) +
                   __builtin_convertvector(load<Vf>(differences + j), Vd);
    store_bf16(static_cast<Bf16::Word*>(out) + j, odd_bits(limited(sum, Bf16::largest())));
  }
#endif
  add_rest<Bf16>(base, differences, out, j, count);
}

void add_f16(const void* base, const float* differences, void* out, std::size_t count) {
  std::size_t j = 0;
#if FEDCORE_F16C
  const auto* from = static_cast<const F16::Word*>(base);
  for (; from != nullptr && j + kLanes <= count; j += kLanes) {
    const Vd sum = __builtin_convertvector(half_lanes_of(from + j), Vd) +
                   __builtin_convertvector(load<Vf>(differences + j), Vd);
    store_f16(static_cast<F16::Word*>(out) + j, odd_bits(limited(sum, F16::largest())));
  }
#endif
  add_rest<F16>(base, differences, out, j, count);
}

// --- Differences, and what their encoding lost ---

// The largest magnitude that was seen, as an integer of its bits, lane by lane.
struct Largest {
  typedef std::int32_t Vi __attribute__((vector_size(4 * FEDCORE_LANES)));
  Vi lanes = Vi{};
  std::int32_t single = 0;

  FEDCORE_INLINE void look_at(Vf values) {
    const Vi bits = bits_as<Vi>(values) & 0x7FFFFFFF;
    lanes = bits > lanes ? bits : lanes;
  }
  FEDCORE_INLINE void look_at(float value) {
    const std::int32_t bits = __builtin_bit_cast(std::int32_t, value) & 0x7FFFFFFF;
    single = bits > single ? bits : single;
  }
  FEDCORE_INLINE bool all_finite() const {
    std::int32_t most = single;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      most = lanes[lane] > most ? lanes[lane] : most;
    }
    return most < 0x7F800000;
  }
};

// What a format's kLanes elements are as numbers, where there are instructions for that.
FEDCORE_INLINE Vf floats_of(F32, const F32::Word* from) { return load<Vf>(from); }
FEDCORE_INLINE void store_odd(F32, F32::Word* to, Vd value) {
  const Vf most = Vf{} + static_cast<float>(F32::largest());
  auto nearest = __builtin_convertvector(value, Vf);  // infinity is limited here
  nearest = nearest > most ? most : nearest;
  store(to, nearest < -most ? -most : nearest);
}
#if FEDCORE_F16C
FEDCORE_INLINE Vf floats_of(Bf16, const Bf16::Word* from) { return lanes_of(from); }
FEDCORE_INLINE Vf floats_of(F16, const F16::Word* from) { return half_lanes_of(from); }
FEDCORE_INLINE void store_odd(Bf16, Bf16::Word* to, Vd value) {
  store_bf16(to, odd_bits(limited(value, Bf16::largest())));
}
FEDCORE_INLINE void store_odd(F16, F16::Word* to, Vd value) {
  store_f16(to, odd_bits(limited(value, F16::largest())));
}
#endif

// Asks for what is subtracted soon, once a line: the prefetcher of the processor stops at the end of
// each page. Between two calls other work is done in the first level of the cache, where more than
// this of each input would be in its way.
constexpr std::size_t kSoon = 2048;
FEDCORE_INLINE void ask_ahead(const void* from, std::size_t at) {
  if (FEDCORE_F16C && at % kLine == 0) {
    __builtin_prefetch(static_cast<const char*>(from) + at + kSoon);
  }
}

template <typename T>
FEDCORE_INLINE Vd doubles_of(const void* from, std::size_t at) {
  const Vf floats = floats_of(T{}, static_cast<const typename T::Word*>(from) + at);
#if FEDCORE_LANES == 8
  return bits_as<Vd>(_mm512_cvtps_pd(bits_as<__m256>(floats)));
#elif FEDCORE_F16C
  return bits_as<Vd>(_mm256_cvtps_pd(bits_as<__m128>(floats)));
#else
  return __builtin_convertvector(floats, Vd);
#endif
}

// With a residual two operations in binary64 are rounded once more to binary32.
template <typename T>
FEDCORE_INLINE bool subtract_from(const void* values, const void* base, const void* residual,
                                  float* out, std::size_t begin, std::size_t count,
                                  Largest& largest) {
  for (std::size_t j = begin; j < count; ++j) {
    double value = arith::element<T>(&values, 0, j);
    value = base != nullptr ? value - arith::element<T>(&base, 0, j) : value;
    value = residual != nullptr ? value + arith::element<T>(&residual, 0, j) : value;
    out[j] = static_cast<float>(value);
    largest.look_at(out[j]);
  }
  return largest.all_finite();
}

// The difference of two binary32 numbers that is rounded to binary64 first has the same bits.
template <typename T>
FEDCORE_INLINE bool subtract_lanes(const void* values, const void* base, const void* residual,
                                   float* out, std::size_t count) {
  Largest largest;
  std::size_t j = 0;
  if (base != nullptr && residual == nullptr) {
    for (; j + kLanes <= count; j += kLanes) {
      ask_ahead(values, j * sizeof(typename T::Word));
      ask_ahead(base, j * sizeof(typename T::Word));
      const Vf difference = floats_of(T{}, static_cast<const typename T::Word*>(values) + j) -
                            floats_of(T{}, static_cast<const typename T::Word*>(base) + j);
      largest.look_at(difference);
      store(out + j, difference);
    }
  } else if (base != nullptr) {
    for (; j + kLanes <= count; j += kLanes) {
      ask_ahead(values, j * sizeof(typename T::Word));
      ask_ahead(base, j * sizeof(typename T::Word));
      ask_ahead(residual, j * sizeof(typename T::Word));
      const Vd difference =
          (doubles_of<T>(values, j) - doubles_of<T>(base, j)) + doubles_of<T>(residual, j);
      const Vf rounded = __builtin_convertvector(difference, Vf);
      largest.look_at(rounded);
      store(out + j, rounded);
    }
  }
  return subtract_from<T>(values, base, residual, out, j, count, largest);
}

template <typename T>
FEDCORE_INLINE void carry_from(const void* values, const void* residual, const void* decoded,
                               void* out, std::size_t begin, std::size_t count) {
  for (std::size_t j = begin; j < count; ++j) {
    const double rest = residual != nullptr ? arith::element<T>(&residual, 0, j) : 0.0;
    const double lost =
        (arith::element<T>(&values, 0, j) - arith::element<T>(&decoded, 0, j)) + rest;
    const auto word = T::encode(arith::limited<T>(lost));
    __builtin_memcpy(static_cast<char*>(out) + j * sizeof word, &word, sizeof word);
  }
}

template <typename T>
FEDCORE_INLINE void carry_lanes(const void* values, const void* residual, const void* decoded,
                                void* out, std::size_t count) {
  std::size_t j = 0;
  for (; residual != nullptr && j + kLanes <= count; j += kLanes) {
    const Vd lost =
        (doubles_of<T>(values, j) - doubles_of<T>(decoded, j)) + doubles_of<T>(residual, j);
    store_odd(T{}, static_cast<typename T::Word*>(out) + j, lost);
  }
  carry_from<T>(values, residual, decoded, out, j, count);
}

bool subtract_f64(const void* values, const void* base, const void* residual, float* out,
                  std::size_t count) {
  Largest largest;
  return subtract_from<F64>(values, base, residual, out, 0, count, largest);
}

void carry_f64(const void* values, const void* residual, const void* decoded, void* out,
               std::size_t count) {
  carry_from<F64>(values, residual, decoded, out, 0, count);
}

bool subtract_f32(const void* values, const void* base, const void* residual, float* out,
                  std::size_t count) {
  return subtract_lanes<F32>(values, base, residual, out, count);
}

void carry_f32(const void* values, const void* residual, const void* decoded, void* out,
               std::size_t count) {
  carry_lanes<F32>(values, residual, decoded, out, count);
}

#if FEDCORE_F16C
bool subtract_bf16(const void* values, const void* base, const void* residual, float* out,
                   std::size_t count) {
  return subtract_lanes<Bf16>(values, base, residual, out, count);
}

bool subtract_f16(const void* values, const void* base, const void* residual, float* out,
                  std::size_t count) {
  return subtract_lanes<F16>(values, base, residual, out, count);
}

void carry_bf16(const void* values, const void* residual, const void* decoded, void* out,
                std::size_t count) {
  carry_lanes<Bf16>(values, residual, decoded, out, count);
}

void carry_f16(const void* values, const void* residual, const void* decoded, void* out,
               std::size_t count) {
  carry_lanes<F16>(values, residual, decoded, out, count);
}
#else
bool subtract_bf16(const void* values, const void* base, const void* residual, float* out,
                   std::size_t count) {
  Largest largest;
  return subtract_from<Bf16>(values, base, residual, out, 0, count, largest);
}

bool subtract_f16(const void* values, const void* base, const void* residual, float* out,
                  std::size_t count) {
  Largest largest;
  return subtract_from<F16>(values, base, residual, out, 0, count, largest);
}

void carry_bf16(const void* values, const void* residual, const void* decoded, void* out,
                std::size_t count) {
  carry_from<Bf16>(values, residual, decoded, out, 0, count);
}

void carry_f16(const void* values, const void* residual, const void* decoded, void* out,
               std::size_t count) {
  carry_from<F16>(values, residual, decoded, out, 0, count);
}
#endif
