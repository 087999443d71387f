// The encodings of a run of binary32 values, one run at a time: how many bytes, and which.
//
// Owns nothing but a cursor; the bytes are those of docs/protocol.md, the same on every machine:
// every step is one IEEE 754 operation in binary32, rounded to nearest, ties to even. Bytes are
// little-endian and need no alignment. check() looks at every byte of an encoded run before
// anything is read from it and never throws; a Reader may be made only of what check() let pass.
// Pure functions, callable from any thread. Cost: one or two passes over the run, bound by
// arithmetic; top-k keeps 512 KiB of counters while it encodes.
//
// int8: block-wise absolute maximum (Dettmers et al. 2022, eq. 1-2). nf4: 4-bit NormalFloat with
// double quantisation (Dettmers et al. 2023, section 3). top-k: the largest magnitudes (Aji and
// Heafield 2017).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/decode.hpp"

namespace fedcore::quantise {

inline constexpr std::size_t kTile = 4096;  // values that a Reader gives at most in one call

// An array of an encoded run: from byte `offset` on, one entry of `width` bytes for each `per`
// values.
struct Array {
  std::size_t offset, per, width;
};

// What a run of `count` > 0 values consists of: codes, then scales, then nf4's scales of blocks; of
// width 0 what its encoding has not. Not for kRaw and kTopK.
std::array<Array, 3> arrays(Encoding encoding, std::size_t count) noexcept;

// Bytes of `count` encoded values, count > 0; of top-k the fewest there can be. Not for kRaw.
std::size_t encoded_bytes(Encoding encoding, std::size_t count) noexcept;

// Appends `count` > 0 finite values to `out`. `keep` is for top-k alone: how many to keep at most.
void encode(Encoding encoding, const float* values, std::size_t count, std::size_t keep,
            std::vector<std::uint8_t>& out);

// The values that share a scale of nf4's scales: all of them are looked at before one is encoded.
inline constexpr std::size_t kPiece = kNf4Block * kNf4Group;
// The largest magnitude of each block of nf4 in such a piece.
using Magnitudes = std::array<float, kNf4Group>;

// encode() for a run of `count` values by parts, of which the first element and the length `n` are
// multiples of kInt8Block but for n at the run's end. `run` has encoded_bytes(). Not for kTopK, whose
// lengths depend on the values.
//
// look_at() fills an entry of `largest` for each block of a part; encode_scales() wants those of a
// whole piece, which begins at a multiple of kPiece. Both are for nf4, and do nothing for others.
void look_at(Encoding encoding, const float* values, std::size_t n, float* largest);
void encode_scales(Encoding encoding, const float* largest, std::size_t first, std::size_t n,
                   std::size_t count, std::uint8_t* run);
// Encodes finite values, of which the scales of nf4 are in `run`.
void encode_piece(Encoding encoding, const float* values, std::size_t first, std::size_t n,
                  std::size_t count, std::uint8_t* run);

// Returns nullptr and the length of the encoded run if `size` bytes begin with one of `count`
// values, else why they do not.
const char* check(Encoding encoding, const std::uint8_t* data, std::size_t size, std::size_t count,
                  std::size_t& used) noexcept;

// The length of a checked run.
std::size_t used_bytes(Encoding encoding, const std::uint8_t* data, std::size_t count) noexcept;

// Gives the values of a checked run from the first to the last.
class Reader {
 public:
  Reader(Encoding encoding, const std::uint8_t* data, std::size_t count) noexcept;

  // The next `n` values, at most kTile, and a multiple of kInt8Block but at the run's end.
  void next(float* out, std::size_t n) noexcept;

 private:
  void next_top_k(float* out, std::size_t n) noexcept;
  void find_next_kept() noexcept;

  Encoding encoding_;
  const std::uint8_t* data_;
  std::size_t count_;
  std::size_t at_ = 0;
  // Of top-k: the gaps not read yet, how many of the values were given, and the next one's place.
  const std::uint8_t* gaps_ = nullptr;
  std::size_t kept_ = 0, given_ = 0, place_ = 0;
};

}  // namespace fedcore::quantise
