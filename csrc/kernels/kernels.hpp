// Decode-and-reduce loops, one body compiled per instruction set and chosen once per process.
//
// mean(): out[j] = round(sum_k w[k] * x[k][j] / total), element by element, in the order of k.
//   F32, F16, BF16: products are exact in binary64 (24-bit weight, at most 24-bit significand), the
//   sum is
//     binary64, one division, and one rounding to the output format, ties to even.
//   F64: each product is split into two exact ones and the sum is carried in double-double (Dekker
//   1971,
//     Knuth's TwoSum), then divided and rounded; a sum that would overflow is formed from scaled
//     values.
// Every level and every device gives the same bits. Pointers need no alignment. No state; callable
// from any thread. Cost: bound by memory; scratch is a few KiB of stack.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "format/layout.hpp"
#include "kernels/device.h"

namespace fedcore::kernels {

// A weight has at most 24 significant bits, so that its product with an element is exact.
inline constexpr std::uint32_t kMaxWeight = (1u << 24) - 1;
inline constexpr char kWeightRule[] =
    "an integer from 1 to 2^64 - 1 with at most 24 significant bits";
constexpr bool is_weight(std::uint64_t weight) noexcept {
  return weight != 0 && (weight >> std::countr_zero(weight)) <= kMaxWeight;
}

// One block of `count` elements from `k` inputs. Returns false if a result is NaN or infinite,
// which for F32, F16 and BF16 means that an input is.
using MeanFn = bool (*)(const void* const* inputs, const double* weights, std::size_t k,
                        double total, void* out, std::size_t count);

// The same in binary64, before the rounding to the dtype.
using MeanWideFn = bool (*)(const void* const* inputs, const double* weights, std::size_t k,
                            double total, double* out, std::size_t count);

// Sums that lie in memory between one input and the next, and their mean.
using FoldFn = void (*)(const void* input, double weight, bool first, double* sums,
                        std::size_t count);
using FinishFn = void (*)(const double* sums, double total, void* out, std::size_t count);
using FinishWideFn = void (*)(const double* sums, double total, double* out, std::size_t count);

// Elements and differences to them, added.
using AddFn = void (*)(const void* base, const float* differences, void* out, std::size_t count);

// Two rows of keys, of which `low` gets the smaller one at each place and `high` the other.
template <typename Key>
using ExchangeFn = void (*)(Key* low, Key* high, std::size_t count);

// values - base + residual, and values + residual - decoded.
using SubtractFn = bool (*)(const void* values, const void* base, const void* residual, float* out,
                            std::size_t count);
using CarryFn = void (*)(const void* values, const void* residual, const void* decoded, void* out,
                         std::size_t count);

// Values and what encodes them; quantise.hpp says what each array holds. The arrays of encode_int8 and
// decode_int8 begin with a block. The scales of nf4 are those of one group, and are made of the
// largest magnitude of each of its blocks. encode_nf4, for which the scales are there, and decode_nf4
// begin at element `first` of the run that their arrays are of, with which a block begins.
using EncodeInt8Fn = void (*)(const float* values, std::size_t count, std::uint8_t* scales,
                              std::uint8_t* codes);
using LargestNf4Fn = void (*)(const float* values, std::size_t count, float* largest);
using EncodeNf4ScalesFn = void (*)(const float* largest, std::size_t blocks, std::uint8_t* outer,
                                   std::uint8_t* minis);
using EncodeNf4Fn = void (*)(const float* values, const std::uint8_t* outers,
                             const std::uint8_t* minis, std::size_t first, std::size_t count,
                             std::uint8_t* codes);
using DecodeInt8Fn = void (*)(const std::uint8_t* scales, const std::uint8_t* codes,
                              std::size_t count, float* out);
using DecodeNf4Fn = void (*)(const std::uint8_t* outers, const std::uint8_t* minis,
                             const std::uint8_t* codes, std::size_t first, std::size_t count,
                             float* out);
using EncodeCastFn = void (*)(const float* values, std::size_t count, std::uint8_t* words);
using DecodeCastFn = void (*)(const std::uint8_t* words, std::size_t count, float* out);

struct Table {
  const char* name;
  MeanFn f64;
  MeanFn f32;
  MeanFn f16;
  MeanFn bf16;
  MeanWideFn wide_f32, wide_f16, wide_bf16;
  FoldFn fold_f64, fold_f32, fold_f16, fold_bf16;
  FinishFn finish_f64, finish_f32, finish_f16, finish_bf16;
  FinishWideFn finish_wide_f32, finish_wide_f16, finish_wide_bf16;
  AddFn add_f64, add_f32, add_f16, add_bf16;
  ExchangeFn<std::int16_t> exchange_16;
  ExchangeFn<std::int32_t> exchange_32;
  ExchangeFn<std::int64_t> exchange_64;
  SubtractFn subtract_f64, subtract_f32, subtract_f16, subtract_bf16;
  CarryFn carry_f64, carry_f32, carry_f16, carry_bf16;
  EncodeInt8Fn encode_int8;
  DecodeInt8Fn decode_int8;
  LargestNf4Fn largest_nf4;
  EncodeNf4ScalesFn encode_nf4_scales;
  EncodeNf4Fn encode_nf4;
  DecodeNf4Fn decode_nf4;
  EncodeCastFn encode_bf16;
  DecodeCastFn decode_bf16;
  EncodeCastFn encode_f16;
  DecodeCastFn decode_f16;
};

// The chosen table: FEDCORE_SIMD ("baseline", "avx2", "avx512") or the best one that this CPU runs.
// Throws Error{kConfig} if FEDCORE_SIMD names an unknown level or one that this CPU lacks.
const Table& active();
void select(std::string_view level);
// The place of active() among the levels: 0 is "baseline", 1 "avx2", 2 "avx512".
std::size_t level();
std::vector<std::string> available();

// From now on mean() tries `device` first; nullptr: the CPU alone. The device outlives the
// process's last mean. The bits are the same.
void use_device(const FcDevice* device) noexcept;

// Averages one block of one dtype. Integers and booleans are copied from `base`, or from inputs[0]
// where base is nullptr. Returns false if the block holds a non-finite value.
bool mean(Dtype dtype, const void* const* inputs, const double* weights, std::size_t k,
          double total, const void* base, void* out, std::uint64_t nbytes);

// On the device alone: FC_MEAN_DECLINED where there is none. Encoded inputs are those that
// quantise::check let pass.
int mean_on_device(const FcMean& mean) noexcept;

// mean() without the device, for pieces that are too small to send there.
bool mean_here(Dtype dtype, const void* const* inputs, const double* weights, std::size_t k,
               double total, const void* base, void* out, std::uint64_t nbytes);

// mean_here() of a float dtype but F64 in binary64: what finish() would round.
bool mean_wide(Dtype dtype, const void* const* inputs, const double* weights, std::size_t k,
               double total, double* out, std::size_t count);

// mean() with one input at a time: fold() adds an input of finite values to sums_per_element() sums
// for each element (none for integers and booleans), and finish() writes their mean. The bits are
// those of mean() on the same inputs in the same order. An input may be added in pieces of kPiece
// elements and a rest.
inline constexpr std::size_t kPiece = 1024;
std::size_t sums_per_element(Dtype dtype) noexcept;
void fold(Dtype dtype, const void* input, double weight, bool first, double* sums,
          std::uint64_t nbytes);
void finish(Dtype dtype, const double* sums, double total, void* out, std::uint64_t nbytes);
// The means of `count` elements of a float dtype in binary64, before finish() rounds them.
void finish_wide(Dtype dtype, const double* sums, double total, double* out, std::size_t count);

// out[j] = base[j] + differences[j] for `count` elements of a float dtype, rounded once and limited
// to its finite numbers; without a base (nullptr), the differences alone. `out` may be `base`.
void add(Dtype dtype, const void* base, const float* differences, void* out, std::size_t count);

// out[j] = values[j] - base[j] + residual[j] for `count` elements of a float dtype: operations of
// binary64, then one rounding to binary32. Without a base or a residual (nullptr), the rest of it.
// Returns whether all results are finite.
bool subtract(Dtype dtype, const void* values, const void* base, const void* residual, float* out,
              std::size_t count);

// out[j] = values[j] - decoded[j] + residual[j], rounded once and limited to the dtype's finite
// numbers; without a residual (nullptr), 0.0 in its place. `out` may be any of the others.
void carry(Dtype dtype, const void* values, const void* residual, const void* decoded, void* out,
           std::size_t count);

// One comparator of a sorting network over `count` places: the smaller keys go to `low`. The rows
// do not overlap.
void exchange(std::int16_t* low, std::int16_t* high, std::size_t count);
void exchange(std::int32_t* low, std::int32_t* high, std::size_t count);
void exchange(std::int64_t* low, std::int64_t* high, std::size_t count);

// Index of the first NaN or infinity among the elements of a float block, or -1.
std::int64_t find_non_finite(Dtype dtype, const void* data, std::uint64_t nbytes) noexcept;

}  // namespace fedcore::kernels
