// What finish.cpp calls for each piece of a model, with a body for each instruction set; the one in use is
// that of the kernels. All bodies give the same bits. Pure functions, callable from any thread.
#pragma once

#include <cstddef>

#include "format/layout.hpp"

namespace fedcore {

struct FinishStages {
  // Of n elements of a float dtype, by float_place(): the elements as they are in the model, and what
  // is combined less them; and back, limited to finite numbers and rounded once.
  void (*widen[4])(const void* base, const double* combined, double* x, double* step,
                   std::size_t n);
  void (*round[4])(const double* x, void* out, std::size_t n);
  // The same of a master in binary32. keep() leaves in x what it keeps.
  void (*load)(const float* from, double* x, std::size_t n);
  void (*keep)(double* x, float* to, std::size_t n);
  // The next average of elements: `after` may be `before`.
  void (*average)(double decay, const float* before, const double* x, float* after, std::size_t n);
  void (*average_wide)(double decay, const double* before, const double* x, double* after,
                       std::size_t n);
};

constexpr std::size_t float_place(Dtype dtype) noexcept {
  switch (dtype) {
    case Dtype::kF64:
      return 0;
    case Dtype::kF32:
      return 1;
    case Dtype::kF16:
      return 2;
    default:
      return 3;
  }
}

const FinishStages& finish_stages();

}  // namespace fedcore
