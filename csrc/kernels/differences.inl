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
