// Updates for means on a device: some raw, some encoded, with values that reach every corner of the
// encodings' arithmetic, and the model that they are differences to.
#pragma once

#include <optional>
#include <random>
#include <vector>

#include "check.hpp"
#include "codec/codec.hpp"
#include "codec/element.hpp"
#include "kernels/kernels.hpp"
#include "reduce/families.hpp"
#include "reduce/reducer.hpp"

namespace fedcore {

inline constexpr Dtype kFloats[] = {Dtype::kF64, Dtype::kF32, Dtype::kF16, Dtype::kBF16};

// Elements of any finite value, subnormals included.
inline std::vector<std::uint8_t> random_elements(Dtype dtype, std::size_t count,
                                                 std::mt19937_64& random) {
  std::vector<std::uint8_t> bytes(count * item_size(dtype));
  for (std::size_t b = 0; b < bytes.size(); ++b) {
    bytes[b] = static_cast<std::uint8_t>(random());
    if (b % item_size(dtype) == item_size(dtype) - 1) {
      bytes[b] &= 0xBF;  // the top bit of the exponent
    }
  }
  return bytes;
}

// Differences in stretches of one size each: from nothing over subnormals to what no dtype holds.
inline std::vector<float> random_differences(std::size_t count, std::mt19937_64& random) {
  constexpr float kSizes[] = {1e-3f, 0.0f, 1e-41f, 1.0f, 7e4f, 1e-8f, 3e38f};
  std::vector<float> values(count);
  std::uniform_real_distribution<float> part(-1, 1);
  float size = kSizes[0];
  for (std::size_t j = 0; j < count; ++j) {
    size = random() % 50 == 0 ? kSizes[random() % 7] : size;
    values[j] = part(random) * size;
  }
  return values;
}

// One chunk of one tensor from k sites.
struct EncodedInputs {
  // Input i has encodings[i % encodings.size()].
  EncodedInputs(Dtype dtype, std::size_t k, std::size_t count,
                const std::vector<Encoding>& encodings, bool has_base, unsigned seed)
      : layout({{"w", dtype, {static_cast<std::int64_t>(count)}}},
               (count * item_size(dtype) / Layout::kPage + 1) * Layout::kPage),
        range(layout.chunk_range(0)),
        bodies(k),
        out(range.nbytes) {
    std::mt19937_64 random(seed);
    if (has_base) {
      base = random_elements(dtype, count, random);
    }
    for (std::size_t i = 0; i < k; ++i) {
      const Encoding encoding = encodings[i % encodings.size()];
      if (encodes(encoding, dtype)) {
        quantise::encode(encoding, random_differences(count, random).data(), count, count / 10 + 1,
                         bodies[i]);
        std::size_t used = 0;
        CHECK(quantise::check(encoding, bodies[i].data(), bodies[i].size(), count, used) ==
              nullptr);
      } else {
        bodies[i] = random_elements(dtype, count, random);
      }
      inputs.push_back({bodies[i].data(), bodies[i].size(), encoding});
      weights.push_back(static_cast<double>(1 + random() % kernels::kMaxWeight));
    }
  }

  EncodedInputs(EncodedInputs&&) = default;  // a copy's inputs would be the original's bodies

  // The mean by a reducer, on the device that is in use.
  std::optional<BadValue> reduce(std::vector<std::uint8_t>& to) const {
    to.assign(range.nbytes, 0xAA);
    return Reducer(kMean, weights)
        .reduce(layout, range, inputs.data(), base.empty() ? nullptr : base.data(), to.data());
  }

  Layout layout;
  Range range;
  std::vector<std::uint8_t> base;
  std::vector<std::vector<std::uint8_t>> bodies;
  std::vector<Body> inputs;
  std::vector<double> weights;
  std::vector<std::uint8_t> out;
};

}  // namespace fedcore
