// The arithmetic of the mean, element by element, for host and device: the one definition that the
// CPU's loops (kernels.inl) and the CUDA kernels (cuda/reduce.cu) compile.
//
// Every step is an IEEE 754 operation rounded to nearest, subnormals kept, so host and device give
// the same bits if the compiler neither contracts a product and a sum nor flushes subnormals:
// -ffp-contract=off here, -fmad=false -ftz=false there. Pure functions, callable from any thread
// and in any kernel; builtins alone, because what the standard library offers doesn't exist on a
// device. Always inlined: a function that is compiled for one instruction set takes them along.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define FEDCORE_HD __host__ __device__ __forceinline__
#else
#define FEDCORE_HD inline __attribute__((always_inline))
#endif

namespace fedcore::arith {

FEDCORE_HD float bf16_to_float(std::uint32_t bits) { return __builtin_bit_cast(float, bits << 16); }

// Exponent and fraction move into place, and the bias is corrected: by 112, by as much again for
// infinity and NaN, and for a subnormal by the exact difference to 2^-14. No operand is a binary32
// subnormal, with which processors take a hundred times as long.
FEDCORE_HD float half_to_float(std::uint32_t half) {
  const auto magnitude = static_cast<std::int32_t>((half & 0x7FFF) << 13);
  const float small = __builtin_bit_cast(float, magnitude + 0x38800000) - 0x1p-14f;
  const std::int32_t special = -static_cast<std::int32_t>(magnitude >= 0x0F800000) & 0x38000000;
  const std::int32_t subnormal = -static_cast<std::int32_t>(magnitude < 0x00800000);
  const std::int32_t wide = magnitude + 0x38000000 + special;
  const std::int32_t bits =  // by masks, as a branch keeps loops from being vectorised
      (__builtin_bit_cast(std::int32_t, small) & subnormal) | (wide & ~subnormal);
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) | ((half & 0x8000) << 16));
}

// Rounds to binary32 "to odd": an inexact result has its last bit set. Rounding that once more to a
// format at least two bits narrower gives what rounding directly would (Boldo and Melquiond 2008).
FEDCORE_HD std::uint32_t to_odd_float_bits(double value) {
  const float nearest = static_cast<float>(value);
  auto bits = __builtin_bit_cast(std::uint32_t, nearest);
  const double back = nearest;
  bits -= __builtin_fabs(back) > __builtin_fabs(value) ? 1u : 0u;
  bits |= back != value ? 1u : 0u;
  return bits;
}

FEDCORE_HD std::uint16_t to_bf16(double value) {
  const std::uint32_t bits = to_odd_float_bits(value);
  return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

FEDCORE_HD std::uint16_t to_half(double value) {
  const std::uint32_t bits = to_odd_float_bits(value);
  const std::uint32_t magnitude = bits & 0x7FFFFFFF;
  const std::uint32_t normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 the result is subnormal: adding 1/2 lines the bits up with half's last place and
  // rounds.
  const float small = __builtin_bit_cast(float, magnitude) + 0.5f;
  const std::uint32_t subnormal = __builtin_bit_cast(std::uint32_t, small) - 0x3F000000;
  const std::uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  return static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000));
}

// NaN or infinity, as a mask that loops can collect without branching.
FEDCORE_HD std::uint64_t non_finite(double value) {
  const auto bits = __builtin_bit_cast(std::uint64_t, value);
  return (bits & 0x7FF0000000000000u) == 0x7FF0000000000000u ? 1 : 0;
}

// Adds w * x to the pair (sum, rest). x splits into 26 leading bits and the rest, so both products
// with a 24-bit weight are exact. The sign of a zero is kept, here and below: models of -0.0
// average to -0.0.
FEDCORE_HD void add_exact(double& sum, double& rest, double w, double x) {
  const std::uint64_t leading =
      __builtin_bit_cast(std::uint64_t, x) & ~((std::uint64_t{1} << 27) - 1);
  const double head = __builtin_bit_cast(double, leading);
  const double parts[2] = {w * head, w * __builtin_copysign(x - head, x)};
  for (const double part : parts) {
    const double next = sum + part;
    const double virtual_part = next - sum;
    rest += (sum - (next - virtual_part)) + (part - virtual_part);
    sum = next;
  }
}

FEDCORE_HD double divide_pair(double sum, double rest, double total) {
  const double high = rest == 0 ? sum : sum + rest;
  const double low = rest - (high - sum);
  const double quotient = high / total;
  const double remainder = __builtin_fma(-quotient, total, high) + low;
  return remainder == 0 ? quotient : quotient + remainder / total;
}

// The formats: the word that holds an element, the largest finite number, an element's value, which
// is exact, and the word of a mean.
struct F64 {
  typedef std::uint64_t Word;
  static FEDCORE_HD constexpr double largest() { return 0x1.FFFFFFFFFFFFFp1023; }
  static FEDCORE_HD double decode(std::uint64_t word) { return __builtin_bit_cast(double, word); }
  static FEDCORE_HD std::uint64_t encode(double value) {
    return __builtin_bit_cast(std::uint64_t, value);
  }
};

struct F32 {
  typedef std::uint32_t Word;
  static FEDCORE_HD constexpr double largest() { return 0x1.FFFFFEp127; }
  static FEDCORE_HD double decode(std::uint32_t word) { return __builtin_bit_cast(float, word); }
  static FEDCORE_HD std::uint32_t encode(double value) {
    return __builtin_bit_cast(std::uint32_t, static_cast<float>(value));
  }
};

struct F16 {
  typedef std::uint16_t Word;
  static FEDCORE_HD constexpr double largest() { return 65504; }
  static FEDCORE_HD double decode(std::uint16_t word) { return half_to_float(word); }
  static FEDCORE_HD std::uint16_t encode(double value) { return to_half(value); }
};

struct Bf16 {
  typedef std::uint16_t Word;
  static FEDCORE_HD constexpr double largest() { return 0x1.FEp127; }
  static FEDCORE_HD double decode(std::uint16_t word) { return bf16_to_float(word); }
  static FEDCORE_HD std::uint16_t encode(double value) { return to_bf16(value); }
};

// A value limited to the finite numbers of format T.
template <typename T>
FEDCORE_HD double limited(double value) {
  value = value > T::largest() ? T::largest() : value;
  return value < -T::largest() ? -T::largest() : value;
}

// One element's value in input i. T is a format or derives from one; its Word is how elements lie
// in memory (on the host: with no alignment).
template <typename T>
FEDCORE_HD double element(const void* const* inputs, std::size_t i, std::size_t j) {
  return T::decode(static_cast<const typename T::Word*>(inputs[i])[j]);
}

// The same as a function of i and j, which is what a mean is computed of.
template <typename T>
struct Elements {
  const void* const* inputs;
  FEDCORE_HD double operator()(std::size_t i, std::size_t j) const {
    return element<T>(inputs, i, j);
  }
};

// The mean of F64 with every value scaled by a power of two, and not scaled back.
template <typename Values>
FEDCORE_HD double mean_of_doubles(const Values& values, const double* weights, std::size_t k,
                                  double total, std::size_t j, double scale) {
  double sum = -0.0, rest = -0.0;
  for (std::size_t i = 0; i < k; ++i) {
    add_exact(sum, rest, weights[i], values(i, j) * scale);
  }
  return divide_pair(sum, rest, total);
}

// The mean in format T of element j over k >= 1 inputs in their order; kernels.hpp tells the rule.
// values(i, j) is the element's value in input i. Sets `bad` if the result is not finite.
template <typename T, typename Values>
FEDCORE_HD double mean_element(const Values& values, const double* weights, std::size_t k,
                               double total, std::size_t j, std::uint64_t& bad) {
  double mean;
  if constexpr (sizeof(typename T::Word) == 8) {
    mean = mean_of_doubles(values, weights, k, total, j, 1.0);
    if (non_finite(mean)) {  // an input is, or the sum left the range: 2^-100 leaves room for any
      mean = mean_of_doubles(values, weights, k, total, j, 0x1p-100) * 0x1p100;
    }
  } else {
    double sum = weights[0] * values(0, j);
    for (std::size_t i = 1; i < k; ++i) {
      sum += weights[i] * values(i, j);
    }
    mean = sum / total;
  }
  bad |= non_finite(mean);
  return mean;
}

}  // namespace fedcore::arith
