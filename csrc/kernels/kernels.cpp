#include "kernels/kernels.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "base/error.hpp"
#include "kernels/arith.hpp"
#include "kernels/codes.hpp"
#include "kernels/decode.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define FEDCORE_TABLE(level) \
  {#level,                   \
   level::mean_f64,          \
   level::mean_f32,          \
   level::mean_f16,          \
   level::mean_bf16,         \
   level::wide_f32,          \
   level::wide_f16,          \
   level::wide_bf16,         \
   level::fold_f64,          \
   level::fold_f32,          \
   level::fold_f16,          \
   level::fold_bf16,         \
   level::finish_f64,        \
   level::finish_f32,        \
   level::finish_f16,        \
   level::finish_bf16,       \
   level::finish_wide_f32,   \
   level::finish_wide_f16,   \
   level::finish_wide_bf16,  \
   level::add_f64,           \
   level::add_f32,           \
   level::add_f16,           \
   level::add_bf16,          \
   level::exchange_16,       \
   level::exchange_32,       \
   level::exchange_64,       \
   level::subtract_f64,      \
   level::subtract_f32,      \
   level::subtract_f16,      \
   level::subtract_bf16,     \
   level::carry_f64,         \
   level::carry_f32,         \
   level::carry_f16,         \
   level::carry_bf16,        \
   level::encode_int8,       \
   level::decode_int8,       \
   level::largest_nf4,       \
   level::encode_nf4_scales, \
   level::encode_nf4,        \
   level::decode_nf4,        \
   level::encode_bf16,       \
   level::decode_bf16,       \
   level::encode_f16,        \
   level::decode_f16}

namespace fedcore::kernels {
namespace {

// Elements per pass: the sums of a block stay in the first-level cache while the inputs stream by.
constexpr std::size_t kBlock = 1024;

// What arrives in a frame has no alignment.
typedef std::uint16_t UnalignedU16 __attribute__((aligned(1), may_alias));
typedef std::uint32_t UnalignedU32 __attribute__((aligned(1), may_alias));
typedef std::uint64_t UnalignedU64 __attribute__((aligned(1), may_alias));

#define FEDCORE_INLINE inline __attribute__((always_inline))
#define FEDCORE_BODIES "kernels/bodies.inl"
#include "kernels/levels.inl"

constexpr Table kTables[] = {FEDCORE_FOR_LEVELS(FEDCORE_TABLE)};

#if defined(__x86_64__)

// clang++ before 19 does not know this one by name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}

bool runs_here(std::string_view level) {
  if (level == "baseline") {
    return true;
  }
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (level == "avx2") {
    return has_avx2;
  }
  return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#else

bool runs_here(std::string_view) { return true; }

#endif

const Table& find(std::string_view level) {
  std::string known;
  for (const Table& table : kTables) {
    if (level == table.name) {
      if (!runs_here(level)) {
        throw Error(Errc::kConfig, "this CPU can't run the '" + std::string(level) + "' kernels");
      }
      return table;
    }
    known += (known.empty() ? "" : ", ") + std::string(table.name);
  }
  throw Error(Errc::kConfig,
              "no kernels for '" + std::string(level) + "'; expected one of " + known);
}

std::atomic<const Table*> chosen{nullptr};
std::atomic<const FcDevice*> chosen_device{nullptr};

static_assert(static_cast<int>(Dtype::kF64) == FC_F64 && static_cast<int>(Dtype::kF32) == FC_F32 &&
              static_cast<int>(Dtype::kF16) == FC_F16 && static_cast<int>(Dtype::kBF16) == FC_BF16);
static_assert(static_cast<int>(Encoding::kRaw) == FC_RAW &&
              static_cast<int>(Encoding::kBf16) == FC_CAST_BF16 &&
              static_cast<int>(Encoding::kF16) == FC_CAST_F16 &&
              static_cast<int>(Encoding::kInt8) == FC_INT8 &&
              static_cast<int>(Encoding::kNf4) == FC_NF4 &&
              static_cast<int>(Encoding::kTopK) == FC_TOP_K);

const Table& choose() {
  if (const char* forced = std::getenv("FEDCORE_SIMD"); forced != nullptr && *forced != '\0') {
    try {
      return find(forced);
    } catch (const Error& error) {
      throw Error(Errc::kConfig, std::string("FEDCORE_SIMD: ") + error.what());
    }
  }
  const Table* best = &kTables[0];
  for (const Table& table : kTables) {
    if (runs_here(table.name)) {
      best = &table;
    }
  }
  return *best;
}

template <typename Word>
std::int64_t find_exponent(const void* data, std::uint64_t nbytes, Word exponent) noexcept {
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  const std::uint64_t count = nbytes / sizeof(Word);
  for (std::uint64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, bytes + i * sizeof(Word), sizeof(Word));
    if ((word & exponent) == exponent) {
      return static_cast<std::int64_t>(i);
    }
  }
  return -1;
}

}  // namespace

const Table& active() {
  const Table* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = &choose();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

void select(std::string_view level) { chosen.store(&find(level), std::memory_order_release); }

std::size_t level() { return static_cast<std::size_t>(&active() - kTables); }

void use_device(const FcDevice* device) noexcept {
  chosen_device.store(device, std::memory_order_release);
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Table& table : kTables) {
    if (runs_here(table.name)) {
      names.emplace_back(table.name);
    }
  }
  return names;
}

bool mean(Dtype dtype, const void* const* inputs, const double* weights, std::size_t k,
          double total, const void* base, void* out, std::uint64_t nbytes) {
  if (is_float(dtype)) {
    const int verdict = mean_on_device({static_cast<int>(dtype), k, inputs, nullptr, weights, total,
                                        nullptr, out, nbytes / item_size(dtype)});
    if (verdict != FC_MEAN_DECLINED) {
      return verdict == FC_MEAN_FINITE;
    }
  }
  return mean_here(dtype, inputs, weights, k, total, base, out, nbytes);
}

int mean_on_device(const FcMean& mean) noexcept {
  const FcDevice* const device = chosen_device.load(std::memory_order_acquire);
  return device != nullptr ? device->mean(device->self, &mean) : int{FC_MEAN_DECLINED};
}

bool mean_here(Dtype dtype, const void* const* inputs, const double* weights, std::size_t k,
               double total, const void* base, void* out, std::uint64_t nbytes) {
  const Table& table = active();
  const std::size_t count = nbytes / item_size(dtype);
  switch (dtype) {
    case Dtype::kF64:
      return table.f64(inputs, weights, k, total, out, count);
    case Dtype::kF32:
      return table.f32(inputs, weights, k, total, out, count);
    case Dtype::kF16:
      return table.f16(inputs, weights, k, total, out, count);
    case Dtype::kBF16:
      return table.bf16(inputs, weights, k, total, out, count);
    default:
      std::memcpy(out, base != nullptr ? base : inputs[0], nbytes);
      return true;
  }
}

bool mean_wide(Dtype dtype, const void* const* inputs, const double* weights, std::size_t k,
               double total, double* out, std::size_t count) {
  const Table& table = active();
  switch (dtype) {
    case Dtype::kF32:
      return table.wide_f32(inputs, weights, k, total, out, count);
    case Dtype::kF16:
      return table.wide_f16(inputs, weights, k, total, out, count);
    default:
      return table.wide_bf16(inputs, weights, k, total, out, count);
  }
}

std::size_t sums_per_element(Dtype dtype) noexcept {
  return dtype == Dtype::kF64 ? 4 : is_float(dtype) ? 1 : 0;
}

void fold(Dtype dtype, const void* input, double weight, bool first, double* sums,
          std::uint64_t nbytes) {
  const Table& table = active();
  const std::size_t count = nbytes / item_size(dtype);
  switch (dtype) {
    case Dtype::kF64:
      return table.fold_f64(input, weight, first, sums, count);
    case Dtype::kF32:
      return table.fold_f32(input, weight, first, sums, count);
    case Dtype::kF16:
      return table.fold_f16(input, weight, first, sums, count);
    case Dtype::kBF16:
      return table.fold_bf16(input, weight, first, sums, count);
    default:
      return;
  }
}

void finish(Dtype dtype, const double* sums, double total, void* out, std::uint64_t nbytes) {
  const Table& table = active();
  const std::size_t count = nbytes / item_size(dtype);
  switch (dtype) {
    case Dtype::kF64:
      return table.finish_f64(sums, total, out, count);
    case Dtype::kF32:
      return table.finish_f32(sums, total, out, count);
    case Dtype::kF16:
      return table.finish_f16(sums, total, out, count);
    case Dtype::kBF16:
      return table.finish_bf16(sums, total, out, count);
    default:
      return;
  }
}

void finish_wide(Dtype dtype, const double* sums, double total, double* out, std::size_t count) {
  const Table& table = active();
  switch (dtype) {
    case Dtype::kF64:
      return table.finish_f64(sums, total, out, count);
    case Dtype::kF32:
      return table.finish_wide_f32(sums, total, out, count);
    case Dtype::kF16:
      return table.finish_wide_f16(sums, total, out, count);
    default:
      return table.finish_wide_bf16(sums, total, out, count);
  }
}

void add(Dtype dtype, const void* base, const float* differences, void* out, std::size_t count) {
  const Table& table = active();
  switch (dtype) {
    case Dtype::kF64:
      return table.add_f64(base, differences, out, count);
    case Dtype::kF32:
      return table.add_f32(base, differences, out, count);
    case Dtype::kF16:
      return table.add_f16(base, differences, out, count);
    default:
      return table.add_bf16(base, differences, out, count);
  }
}

bool subtract(Dtype dtype, const void* values, const void* base, const void* residual, float* out,
              std::size_t count) {
  const Table& table = active();
  switch (dtype) {
    case Dtype::kF64:
      return table.subtract_f64(values, base, residual, out, count);
    case Dtype::kF32:
      return table.subtract_f32(values, base, residual, out, count);
    case Dtype::kF16:
      return table.subtract_f16(values, base, residual, out, count);
    default:
      return table.subtract_bf16(values, base, residual, out, count);
  }
}

void carry(Dtype dtype, const void* values, const void* residual, const void* decoded, void* out,
           std::size_t count) {
  const Table& table = active();
  switch (dtype) {
    case Dtype::kF64:
      return table.carry_f64(values, residual, decoded, out, count);
    case Dtype::kF32:
      return table.carry_f32(values, residual, decoded, out, count);
    case Dtype::kF16:
      return table.carry_f16(values, residual, decoded, out, count);
    default:
      return table.carry_bf16(values, residual, decoded, out, count);
  }
}

void exchange(std::int16_t* low, std::int16_t* high, std::size_t count) {
  active().exchange_16(low, high, count);
}

void exchange(std::int32_t* low, std::int32_t* high, std::size_t count) {
  active().exchange_32(low, high, count);
}

void exchange(std::int64_t* low, std::int64_t* high, std::size_t count) {
  active().exchange_64(low, high, count);
}

std::int64_t find_non_finite(Dtype dtype, const void* data, std::uint64_t nbytes) noexcept {
  switch (dtype) {
    case Dtype::kF64:
      return find_exponent<std::uint64_t>(data, nbytes, 0x7FF0000000000000u);
    case Dtype::kF32:
      return find_exponent<std::uint32_t>(data, nbytes, 0x7F800000u);
    case Dtype::kF16:
      return find_exponent<std::uint16_t>(data, nbytes, 0x7C00u);
    case Dtype::kBF16:
      return find_exponent<std::uint16_t>(data, nbytes, 0x7F80u);
    default:
      return -1;
  }
}

}  // namespace fedcore::kernels
