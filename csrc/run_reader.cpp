#include "run_reader.hpp"

#include <array>
#include <cstring>
#include <limits>

#include "element.hpp"

namespace fedcore {

namespace {

// A sum of two binary32 numbers that is rounded to binary64 first has the same bits: that format is
// more than twice as precise.
void add_floats(const std::uint8_t* base, const float* values, std::uint8_t* out, std::size_t n) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  for (std::size_t i = 0; i < n; ++i) {
    float value;
    std::memcpy(&value, base + i * sizeof value, sizeof value);
    value += values[i];
    value = value > kLargest ? kLargest : value;
    value = value < -kLargest ? -kLargest : value;
    std::memcpy(out + i * sizeof value, &value, sizeof value);
  }
}

}  // namespace

void RunReader::next(const std::uint8_t* base, std::uint8_t* out, std::size_t n) noexcept {
  std::array<float, kTile> values;
  values_.next(values.data(), n);
  if (dtype_ == Dtype::kF32 && base != nullptr) {
    add_floats(base, values.data(), out, n);
    return;
  }
  with_float(dtype_, [&]<typename T>(T, double limit) {
    for (std::size_t i = 0; i < n; ++i) {
      const double value = values[i];
      T::write(out, i, base != nullptr ? T::read(base, i) + value : value, limit);
    }
  });
}

std::size_t run_bytes(Scheme scheme, const Run& run, const std::uint8_t* body) noexcept {
  return encodes(scheme, run.dtype)
             ? quantise::used_bytes(scheme, body, run.nbytes / item_size(run.dtype))
             : run.nbytes;
}

}  // namespace fedcore
