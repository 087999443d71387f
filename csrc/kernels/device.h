/* The C interface between the kernels (kernels.hpp) and a module that computes means on a device
 * (cuda/). The core knows no device's library; it is given one of these and calls it. The bits are
 * those of the CPU.
 *
 * `mean` is called without the GIL, by any number of threads at once, and doesn't throw. It returns
 * when the result is written: FC_MEAN_FINITE, or FC_MEAN_NON_FINITE where a value of it is not
 * finite; or FC_MEAN_DECLINED, where the device can't do it and the CPU is to, whatever `out` holds
 * by then. The device's struct and what it points at live as long as the process.
 */
#ifndef FEDCORE_DEVICE_H
#define FEDCORE_DEVICE_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FC_DEVICE_CAPSULE "fedcore.device.v2"

enum { FC_F64 = 0, FC_F32 = 1, FC_F16 = 2, FC_BF16 = 3 };

/* How an input holds its elements: as they are, or as a run of an encoding of docs/protocol.md that
 * was checked, of differences to `base`. */
enum { FC_RAW = 0, FC_CAST_BF16 = 1, FC_CAST_F16 = 2, FC_INT8 = 3, FC_NF4 = 4, FC_TOP_K = 5 };

enum { FC_MEAN_FINITE = 0, FC_MEAN_NON_FINITE = 1, FC_MEAN_DECLINED = 2 };

/* out[j] = round(sum_i weights[i] * x[i][j] / total) for `count` > 0 elements of dtype FC_F...,
 * with x[i] the elements of input i: of an encoded one base[j] + its difference, or that alone
 * where base is NULL, rounded to the dtype and limited to its finite numbers. All is host memory,
 * with no alignment. */
typedef struct FcMean {
  int dtype;
  size_t k;
  const void* const* inputs;
  const unsigned char* encodings; /* of each input, or NULL: all are raw */
  const double* weights;
  double total;
  const void* base; /* NULL if no input is encoded */
  void* out;
  size_t count;
} FcMean;

typedef struct FcDevice {
  void* self;
  int (*mean)(void* self, const FcMean* mean);
} FcDevice;

#ifdef __cplusplus
}
#endif

#endif
