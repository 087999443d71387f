#include "codec/run_reader.hpp"

#include <array>

#include "codec/element.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {

void RunReader::next(const std::uint8_t* base, std::uint8_t* out, std::size_t n) noexcept {
  std::array<float, kTile> values;
  values_.next(values.data(), n);
  kernels::add(dtype_, base, values.data(), out, n);
}

std::size_t run_bytes(Encoding encoding, const Run& run, const std::uint8_t* body) noexcept {
  return encodes(encoding, run.dtype)
             ? quantise::used_bytes(encoding, body, run.nbytes / item_size(run.dtype))
             : run.nbytes;
}

}  // namespace fedcore
