// Compiles the file that FEDCORE_BODIES names once for each level of instructions, in a namespace and a
// target region of its own: baseline, avx2, avx512, in the order of kernels::level(). Include it inside an
// unnamed namespace, once in a source. The file may ask FEDCORE_F16C, whether F16C and FMA instructions may
// be used, and FEDCORE_LANES, how many binary64 values a register holds. No product and sum is contracted
// at any level. Afterwards FEDCORE_FOR_LEVELS(of, ...) is of(baseline, ...), of(avx2, ...), of(avx512, ...), as far
// as they exist.

// Vectors only pass between functions that are always inlined: how a call would pass them is moot.
#pragma GCC diagnostic ignored "-Wpsabi"

#define FEDCORE_F16C 0
#define FEDCORE_LANES 4
namespace baseline {
#include FEDCORE_BODIES
}  // namespace baseline
#undef FEDCORE_F16C

#if defined(__x86_64__)

#define FEDCORE_F16C 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include FEDCORE_BODIES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#undef FEDCORE_LANES
#define FEDCORE_LANES 8
namespace avx512 {
#include FEDCORE_BODIES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef FEDCORE_F16C

#define FEDCORE_FOR_LEVELS(of, ...)                                             \
  of(baseline __VA_OPT__(, ) __VA_ARGS__), of(avx2 __VA_OPT__(, ) __VA_ARGS__), \
      of(avx512 __VA_OPT__(, ) __VA_ARGS__)

#else

#define FEDCORE_FOR_LEVELS(of, ...) of(baseline __VA_OPT__(, ) __VA_ARGS__)

#endif

#undef FEDCORE_LANES
