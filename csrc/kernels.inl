// The loop bodies. Included once per instruction set by kernels.cpp, inside a namespace of its own
// and a target region; FEDCORE_F16C says whether the F16C instructions may be used. Only plain
// functions of this file and builtins appear here, so that no function of the library is compiled
// for the wrong target.

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

inline std::uint64_t any_non_finite(const double* sum, std::size_t n) {
  std::uint64_t bad = 0;
  for (std::size_t j = 0; j < n; ++j) {
    bad |= non_finite(sum[j]);
  }
  return bad;
}

// --- F32 ---

inline void add_f32(double* sum, const UnalignedU32* x, double w, std::size_t n, bool first) {
  if (first) {
    for (std::size_t j = 0; j < n; ++j) {
      sum[j] = w * load_f32(x + j);
    }
  } else {
    for (std::size_t j = 0; j < n; ++j) {
      sum[j] += w * load_f32(x + j);
    }
  }
}

bool mean_f32(const void* const* inputs, const double* weights, std::size_t k, double total,
              void* out, std::size_t count) {
  alignas(64) double sum[kBlock];
  std::uint64_t bad = 0;
  auto* result = static_cast<UnalignedU32*>(out);
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t n = count - begin < kBlock ? count - begin : kBlock;
    for (std::size_t i = 0; i < k; ++i) {
      add_f32(sum, static_cast<const UnalignedU32*>(inputs[i]) + begin, weights[i], n, i == 0);
    }
    bad |= any_non_finite(sum, n);
    for (std::size_t j = 0; j < n; ++j) {
      const float value = static_cast<float>(sum[j] / total);
      std::uint32_t bits;
      __builtin_memcpy(&bits, &value, 4);
      result[begin + j] = bits;
    }
  }
  return bad == 0;
}

// --- F16 and BF16 ---

inline void add_bf16(double* sum, const UnalignedU16* x, double w, std::size_t n, bool first) {
  if (first) {
    for (std::size_t j = 0; j < n; ++j) {
      sum[j] = w * static_cast<double>(bf16_to_float(x[j]));
    }
  } else {
    for (std::size_t j = 0; j < n; ++j) {
      sum[j] += w * static_cast<double>(bf16_to_float(x[j]));
    }
  }
}

inline void add_f16(double* sum, const UnalignedU16* x, double w, std::size_t n, bool first) {
  alignas(64) float wide[kBlock];
  std::size_t j = 0;
#if FEDCORE_F16C
  for (; j + 8 <= n; j += 8) {
    __m128i halves;
    __builtin_memcpy(&halves, x + j, 16);
    _mm256_store_ps(wide + j, _mm256_cvtph_ps(halves));
  }
#endif
  for (; j < n; ++j) {
    wide[j] = half_to_float(x[j]);
  }
  if (first) {
    for (j = 0; j < n; ++j) {
      sum[j] = w * static_cast<double>(wide[j]);
    }
  } else {
    for (j = 0; j < n; ++j) {
      sum[j] += w * static_cast<double>(wide[j]);
    }
  }
}

bool mean_bf16(const void* const* inputs, const double* weights, std::size_t k, double total,
               void* out, std::size_t count) {
  alignas(64) double sum[kBlock];
  std::uint64_t bad = 0;
  auto* result = static_cast<UnalignedU16*>(out);
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t n = count - begin < kBlock ? count - begin : kBlock;
    for (std::size_t i = 0; i < k; ++i) {
      add_bf16(sum, static_cast<const UnalignedU16*>(inputs[i]) + begin, weights[i], n, i == 0);
    }
    bad |= any_non_finite(sum, n);
    for (std::size_t j = 0; j < n; ++j) {
      result[begin + j] = to_bf16(sum[j] / total);
    }
  }
  return bad == 0;
}

bool mean_f16(const void* const* inputs, const double* weights, std::size_t k, double total,
              void* out, std::size_t count) {
  alignas(64) double sum[kBlock];
  std::uint64_t bad = 0;
  auto* result = static_cast<UnalignedU16*>(out);
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t n = count - begin < kBlock ? count - begin : kBlock;
    for (std::size_t i = 0; i < k; ++i) {
      add_f16(sum, static_cast<const UnalignedU16*>(inputs[i]) + begin, weights[i], n, i == 0);
    }
    bad |= any_non_finite(sum, n);
    for (std::size_t j = 0; j < n; ++j) {
      result[begin + j] = to_half(sum[j] / total);
    }
  }
  return bad == 0;
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
