// The loop bodies that turn binary32 values into codes and back. Included after differences.inl,
// once per instruction set, with what is said at kernels.inl. quantise.hpp says what the arrays of
// an encoded run are.

FEDCORE_INLINE std::uint32_t word_at(const std::uint8_t* from) {
  std::uint32_t word;
  __builtin_memcpy(&word, from, sizeof word);
  return word;
}

FEDCORE_INLINE float scale_at(const std::uint8_t* from) {
  return __builtin_bit_cast(float, word_at(from));
}

FEDCORE_INLINE void put_scale(std::uint8_t* to, float scale) {
  __builtin_memcpy(to, &scale, sizeof scale);
}

// The bits of a larger magnitude are the larger integer.
FEDCORE_INLINE float largest_magnitude(const float* values, std::size_t count) {
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t bits = __builtin_bit_cast(std::int32_t, values[i]) & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  return __builtin_bit_cast(float, largest);
}

FEDCORE_INLINE float within(float value, float limit) {
  value = value > limit ? limit : value;
  return value < -limit ? -limit : value;
}

// --- int8 ---

#if FEDCORE_F16C
// value / scale as a division rounds it, as divide() of kernels.inl; without one, which takes longer
// than all the rest.
FEDCORE_INLINE float quotient(float value, float scale, float reciprocal) {
  float found = value * reciprocal;
  found = __builtin_fmaf(__builtin_fmaf(-found, scale, value), reciprocal, found);
  return __builtin_fmaf(__builtin_fmaf(-found, scale, value), reciprocal, found);
}
#endif

FEDCORE_INLINE void encode_int8_block(const float* values, std::size_t n, std::uint8_t* scale_to,
                                      std::uint8_t* codes) {
  const float wanted = largest_magnitude(values, n) / 127.0f;
  const float scale = wanted < quantise::kMaxInt8Scale ? wanted : quantise::kMaxInt8Scale;
  put_scale(scale_to, scale);
  if (scale == 0) {
    __builtin_memset(codes, 0, n);
    return;
  }
#if FEDCORE_F16C
  // Here no quotient rounds to more than 127.
  if (scale >= quantise::kMinFastScale && scale < quantise::kMaxInt8Scale) {
    const float reciprocal = 1.0f / scale;
    for (std::size_t i = 0; i < n; ++i) {
      const float rounded = quotient(values[i], scale, reciprocal) + quantise::kRounder;
      codes[i] = static_cast<std::uint8_t>(__builtin_bit_cast(std::uint32_t, rounded));
    }
    return;
  }
#endif
  for (std::size_t i = 0; i < n; ++i) {
    const float rounded = within(values[i] / scale, 127.0f) + quantise::kRounder;
    codes[i] = static_cast<std::uint8_t>(__builtin_bit_cast(std::uint32_t, rounded));
  }
}

void encode_int8(const float* values, std::size_t count, std::uint8_t* scales,
                 std::uint8_t* codes) {
  constexpr std::size_t block = quantise::kInt8Block;
  std::size_t at = 0;
  for (; at + block <= count; at += block) {
    encode_int8_block(values + at, block, scales + at / block * 4, codes + at);
  }
  if (at < count) {
    encode_int8_block(values + at, count - at, scales + at / block * 4, codes + at);
  }
}

void decode_int8(const std::uint8_t* scales, const std::uint8_t* codes, std::size_t count,
                 float* out) {
  constexpr std::size_t block = quantise::kInt8Block;
  for (std::size_t at = 0; at < count; at += block) {
    const float scale = scale_at(scales + at / block * 4);
    const std::size_t n = count - at < block ? count - at : block;
    if (n == block) {  // of a length that the compiler knows
      for (std::size_t i = 0; i < block; ++i) {
        out[at + i] = quantise::int8_value(codes[at + i], scale);
      }
    } else {
      for (std::size_t i = 0; i < n; ++i) {
        out[at + i] = quantise::int8_value(codes[at + i], scale);
      }
    }
  }
}

// --- nf4 ---

// The values of a block whose quotients by `scale` are above the middle between two levels are
// those above that level's border, which is rounded down here.
#if FEDCORE_LANES == 8
FEDCORE_INLINE __m512 borders_of(float scale) {
  constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512d by = _mm512_set1_pd(scale);
  const __m512d lower = _mm512_mul_pd(by, _mm512_loadu_pd(quantise::kBorders.at));
  const __m512d upper = _mm512_mul_pd(by, _mm512_loadu_pd(quantise::kBorders.at + 8));
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvt_roundpd_ps(lower, down)),
                            _mm512_cvt_roundpd_ps(upper, down), 1);
}
#endif

struct Borders {
  alignas(64) float at[16];

  FEDCORE_INLINE explicit Borders(float scale) {
#if FEDCORE_LANES == 8
    _mm512_store_ps(at, borders_of(scale));
#else
    for (std::size_t i = 0; i < 16; ++i) {
      const double exact = scale * quantise::kBorders.at[i];
      const float nearest = static_cast<float>(exact);
      const auto bits = __builtin_bit_cast(std::int32_t, nearest);
      const std::int32_t down = bits < 0 ? 1 : -1;
      at[i] = __builtin_bit_cast(float, bits + (nearest > exact ? down : 0));
    }
#endif
  }

  // The code of a value, for the rest of a block.
  FEDCORE_INLINE std::uint32_t code(float value) const {
    std::uint32_t found = 0;
    for (std::size_t i = 0; i < 15; ++i) {
      found += value > at[i] ? 1u : 0u;
    }
    return found;
  }
};

FEDCORE_INLINE void encode_nf4_rest(const float* values, std::size_t n, const Borders& borders,
                                    std::uint8_t* out) {
  for (std::size_t i = 0; i < n; i += 2) {
    const std::uint32_t high = i + 1 < n ? borders.code(values[i + 1]) << 4 : 0;
    out[i / 2] = static_cast<std::uint8_t>(borders.code(values[i]) | high);
  }
}

#if FEDCORE_LANES == 8

// The codes of a block, by the cells of its values. Lane j of vector i gets its code in byte i.
FEDCORE_INLINE void encode_nf4_block(const float* values, float scale, std::uint8_t* out) {
  if (scale < quantise::kMinCellScale) {
    return encode_nf4_rest(values, quantise::kNf4Block, Borders(scale), out);
  }
  const __m512 most = _mm512_set1_ps(scale * quantise::kInCells);
  const __m512 least = _mm512_set1_ps(-scale * quantise::kInCells);
  const __m512 cells = _mm512_set1_ps(16 / scale);
  const __m512 middle = _mm512_set1_ps(quantise::kRounder + 16);
  const __m512i below_lower = _mm512_loadu_si512(quantise::kCells.below);
  const __m512i below_upper = _mm512_loadu_si512(quantise::kCells.below + 16);
  const __m512 borders = borders_of(scale);
  const __m512 border_lower = _mm512_permutexvar_ps(below_lower, borders);
  const __m512 border_upper = _mm512_permutexvar_ps(below_upper, borders);
  __m512i codes = _mm512_setzero_si512();
  for (unsigned i = 0; i < 4; ++i) {
    const __m512 value = _mm512_loadu_ps(values + std::size_t{16} * i);
    const __m512 inside = _mm512_max_ps(_mm512_min_ps(value, most), least);
    const __m512i cell = _mm512_castps_si512(_mm512_fmadd_ps(inside, cells, middle));
    const __m512 border = _mm512_permutex2var_ps(border_lower, cell, border_upper);
    const __m512i below = _mm512_permutex2var_epi32(below_lower, cell, below_upper);
    const __mmask16 above = _mm512_cmp_ps_mask(value, border, _CMP_GT_OQ);
    const __m512i code = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
    codes = _mm512_or_si512(codes, _mm512_slli_epi32(code, 8 * i));
  }
  // Of two lanes one byte each; then the bytes of each vector together.
  const __m256i pairs = _mm512_cvtepi64_epi32(_mm512_or_si512(codes, _mm512_srli_epi64(codes, 28)));
  const __m256i by_vector =
      _mm256_shuffle_epi8(pairs, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                     0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(out),
      _mm256_permutevar8x32_epi32(by_vector, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

FEDCORE_INLINE void decode_nf4_block(const std::uint8_t* codes, float scale, float* out) {
  const __m512 levels = _mm512_loadu_ps(quantise::kLevels.at);
  const __m512 by = _mm512_set1_ps(scale);
  for (std::size_t i = 0; i < quantise::kNf4Block; i += 16) {
    const __m512i bytes =
        _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m512i places = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_permutexvar_ps(places, levels), by));
  }
}

#else

FEDCORE_INLINE void encode_nf4_block(const float* values, float scale, std::uint8_t* out) {
  const Borders borders(scale);
  std::uint32_t codes[quantise::kNf4Block];
  for (std::size_t i = 0; i < quantise::kNf4Block; i += 2 * kLanes) {
    const auto value = load<Wf>(values + i);
    auto negative = value > Wf{} + borders.at[0];
    for (std::size_t b = 1; b < 15; ++b) {
      negative += value > Wf{} + borders.at[b];
    }
    store(codes + i, -negative);
  }
  for (std::size_t i = 0; i < quantise::kNf4Block; i += 2) {
    out[i / 2] = static_cast<std::uint8_t>(codes[i] | codes[i + 1] << 4);
  }
}

FEDCORE_INLINE void decode_nf4_block(const std::uint8_t* codes, float scale, float* out) {
  for (std::size_t i = 0; i < quantise::kNf4Block; i += 2) {
    const quantise::Nf4Pair pair = quantise::kPairs.at[codes[i / 2]];
    out[i] = pair.low * scale;
    out[i + 1] = pair.high * scale;
  }
}

#endif

void largest_nf4(const float* values, std::size_t count, float* largest) {
  constexpr std::size_t block = quantise::kNf4Block;
  for (std::size_t at = 0; at < count; at += block) {
    largest[at / block] = count - at < block ? largest_magnitude(values + at, count - at)
                                             : largest_magnitude(values + at, block);
  }
}

void encode_nf4_scales(const float* largest, std::size_t blocks, std::uint8_t* outer_to,
                       std::uint8_t* minis) {
  const float wanted = largest_magnitude(largest, blocks) / quantise::kMaxMini;
  const float outer = wanted < quantise::kMaxNf4Scale ? wanted : quantise::kMaxNf4Scale;
  put_scale(outer_to, outer);
  if (outer == 0) {
    __builtin_memset(minis, 0, blocks);
    return;
  }
  std::uint8_t made[quantise::kNf4Group];
  for (std::size_t i = 0; i < blocks; ++i) {
    made[i] = quantise::to_mini(largest[i] / outer);
  }
  __builtin_memcpy(minis, made, blocks);
}

void encode_nf4(const float* values, const std::uint8_t* outers, const std::uint8_t* minis,
                std::size_t first, std::size_t count, std::uint8_t* codes) {
  constexpr std::size_t block = quantise::kNf4Block;
  for (std::size_t at = 0; at < count; at += block) {
    const std::size_t place = (first + at) / block;
    const std::size_t n = count - at < block ? count - at : block;
    const float scale =
        scale_at(outers + place / quantise::kNf4Group * 4) * quantise::nf4_mini(minis[place]);
    std::uint8_t* const to = codes + (first + at) / 2;
    if (scale == 0) {
      __builtin_memset(to, quantise::kZeroCode | quantise::kZeroCode << 4, n / 2);
      if (n % 2 == 1) {
        to[n / 2] = quantise::kZeroCode;
      }
    } else if (n == block) {
      encode_nf4_block(values + at, scale, to);
    } else {
      encode_nf4_rest(values + at, n, Borders(scale), to);
    }
  }
}

void decode_nf4(const std::uint8_t* outers, const std::uint8_t* minis, const std::uint8_t* codes,
                std::size_t first, std::size_t count, float* out) {
  constexpr std::size_t block = quantise::kNf4Block;
  for (std::size_t at = 0; at < count; at += block) {
    const std::size_t place = (first + at) / block;
    const float scale =
        scale_at(outers + place / quantise::kNf4Group * 4) * quantise::nf4_mini(minis[place]);
    const std::uint8_t* from = codes + (first + at) / 2;
    if (count - at >= block) {
      decode_nf4_block(from, scale, out + at);
      continue;
    }
    for (std::size_t i = 0; i < count - at; ++i) {
      out[at + i] = quantise::kLevels.at[(from[i / 2] >> (i % 2 * 4)) & 15] * scale;
    }
  }
}

// --- Casts ---

void encode_bf16(const float* values, std::size_t count, std::uint8_t* out) {
  UnalignedU16* words = reinterpret_cast<UnalignedU16*>(out);
  for (std::size_t i = 0; i < count; ++i) {
    const auto bits = __builtin_bit_cast(std::uint32_t, within(values[i], quantise::kMaxBf16));
    words[i] = static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}

void decode_bf16(const std::uint8_t* words, std::size_t count, float* out) {
  const UnalignedU16* from = reinterpret_cast<const UnalignedU16*>(words);
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = arith::bf16_to_float(from[i]);
  }
}

void encode_f16(const float* values, std::size_t count, std::uint8_t* out) {
  UnalignedU16* words = reinterpret_cast<UnalignedU16*>(out);
  std::size_t i = 0;
#if FEDCORE_F16C
  for (; i + kLanes <= count; i += kLanes) {
    const Vf most = Vf{} + quantise::kMaxF16;
    auto value = load<Vf>(values + i);
    value = value > most ? most : value;
    value = value < -most ? -most : value;
    store_f16(words + i, bits_as<Vu>(value));
  }
#endif
  for (; i < count; ++i) {
    words[i] = arith::to_half(within(values[i], quantise::kMaxF16));
  }
}

void decode_f16(const std::uint8_t* words, std::size_t count, float* out) {
  const UnalignedU16* from = reinterpret_cast<const UnalignedU16*>(words);
  std::size_t i = 0;
#if FEDCORE_F16C
  for (; i + kLanes <= count; i += kLanes) {
    store(out + i, half_lanes_of(from + i));
  }
#endif
  for (; i < count; ++i) {
    out[i] = arith::half_to_float(from[i]);
  }
}
