/* The C interface between the kernels (kernels.hpp) and a module that computes means on a device
 * (cuda/). The core knows no device's library; it is given one of these and calls it. The bits are
 * those of the CPU.
 *
 * `mean` is called without the GIL, by any number of threads at once, and doesn't throw. It returns
 * when `out` is written: FC_MEAN_FINITE, or FC_MEAN_NON_FINITE where a result is not finite; or
 * FC_MEAN_DECLINED, where the device can't do it and the CPU is to, whatever `out` holds by then.
 * The struct and what it points at live as long as the process.
 */
#ifndef FEDCORE_DEVICE_H
#define FEDCORE_DEVICE_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FC_DEVICE_CAPSULE "fedcore.device.v1"

enum { FC_F64 = 0, FC_F32 = 1, FC_F16 = 2, FC_BF16 = 3 };

enum { FC_MEAN_FINITE = 0, FC_MEAN_NON_FINITE = 1, FC_MEAN_DECLINED = 2 };

typedef struct FcDevice {
  void* self;
  /* out[j] = round(sum_i weights[i] * inputs[i][j] / total) for `count` elements of dtype FC_...;
   * host memory, with no alignment. */
  int (*mean)(void* self, int dtype, const void* const* inputs, const double* weights, size_t k,
              double total, void* out, size_t count);
} FcDevice;

#ifdef __cplusplus
}
#endif

#endif
