// encode_update(): all chunks of an update as the bytes that travel, in one call over mapped files.
//
// For each chunk: the codec encodes values - base + residual, the body is checked as the receiver checks it, what
// the encoding lost is written as the next residual, and both get their checksums. Bodies lie back to back in
// `out`, in the order of the chunks. Stages that need the whole update get a first pass; where what the receiver
// decodes breaks the bound of one, the update is encoded again (stage.hpp).
//
// Owns nothing after the call: its threads are joined before it returns or throws. The bytes and the error do not
// depend on the number of threads: the chunk with the lowest index that fails is the one that is reported. Memory:
// each thread has a copy of the codec and one chunk's body, so it does not grow with the update; pages that are
// done are released. Cost: one pass over the files that are read, one over those that are written.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "codec/codec.hpp"
#include "codec/update_files.hpp"

namespace fedcore {

struct EncodedUpdate {
  std::vector<std::uint64_t> offsets;  // chunk i is bytes offsets[i] to offsets[i + 1] of `out`
  std::vector<std::uint8_t> encodings;
  std::vector<std::uint32_t> checksums;  // CRC-32C of each body
  std::uint32_t lost_checksum = 0;       // CRC-32C of all of the next residual; 0 without one
  // Of each stage (Stage::figure): what it found of the differences before it, 0 without a first pass; and of what
  // the receiver decodes, 0 where that is not checked.
  std::vector<double> found, decoded;
};

// Encodes with `threads` workers, the caller among them. `progress` runs on the calling thread between two chunks;
// what it throws stops the work. Throws Error{kStorage} for a range outside its file, for a file that became shorter
// meanwhile and for a full disk, and what Codec::encode throws: Error{kNonFinite} names tensor and element. `out` and `lost` are of no use then.
EncodedUpdate encode_update(const Codec& codec, const UpdateFiles& files, unsigned threads,
                            const std::function<void()>& progress = {});

}  // namespace fedcore
