// What stages of a codec need of a whole update (stage.hpp): first passes before it is encoded, and a look
// at what the receiver decodes.
//
// Owns nothing after a call: threads are joined before it returns or throws. The sums, and which error
// is thrown, do not depend on the number of threads. Cost of a first pass: the files are read once
// more; 64 bytes a chunk.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "codec/codec.hpp"
#include "codec/stage.hpp"
#include "codec/update_files.hpp"

namespace fedcore {

// Adds sums, chunk after chunk.
StageSums add_up(const std::vector<StageSums>& of_chunks) noexcept;

// The codec with each stage that asks for a first pass fitted to the update, and in `figures` an entry
// for each stage: what its sums came to; 0 where it asks for none. Throws what encode_update() throws
// for the values.
Codec fit_stages(const Codec& codec, const UpdateFiles& files, unsigned threads,
                 const std::function<void()>& progress, std::vector<double>& figures);

// Indices of the stages whose bounds are checked: those that bound, from the last one on backwards.
std::vector<std::size_t> checked_stages(const Codec& codec);

// The codec with stages that are tighter, if one of `checked` is not content with its sums of what the
// receiver decodes.
std::optional<Codec> tighten_stages(const Codec& codec, const std::vector<std::size_t>& checked,
                                    const std::vector<StageSums>& decoded);

}  // namespace fedcore
