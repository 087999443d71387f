// Codec: one chunk of a layout as the bytes that travel, and back.
//
// Owns scratch of a few chunks and nothing of its callers'; remembers nothing from one chunk to the
// next. The bytes are those of docs/protocol.md. An encoded chunk is never longer than the chunk:
// what would be is sent raw. Integers and booleans travel as they are. decode() looks at all of a
// body before it writes its first byte, takes every length from the layout and none from the body,
// and never throws for what a body holds. Neither call is reentrant: one thread at a time. Cost:
// one pass to check, one to decode; packed bodies are unpacked into scratch first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "codec/quantise.hpp"
#include "codec/run_reader.hpp"
#include "format/layout.hpp"

namespace fedcore {

class Stage;  // stage.hpp

// The names of the encodings: raw, bf16, fp16, int8, nf4, top-k. Throws Error{kConfig} for any other.
Encoding parse_encoding(std::string_view name);

// LZ4's block functions, LZ4_compress_default and LZ4_decompress_safe; handed in, so that the core
// needs no library.
struct Lz4 {
  int (*compress)(const char* from, char* to, int size, int capacity) = nullptr;
  int (*decompress)(const char* from, char* to, int size, int capacity) = nullptr;
};

struct CodecOptions {
  Encoding encoding = Encoding::kRaw;
  bool lossless = false;  // byte shuffle and LZ4 on top where that saves 5 %
  double top_k = 0.01;    // the share of each run that top-k keeps, above 0, at most 1
  std::vector<std::shared_ptr<const Stage>> stages;  // before encode(), in this order
};

// A body that check() let pass, unpacked: what travelled, or its codec's scratch.
struct Body {
  const std::uint8_t* data = nullptr;
  std::size_t size = 0;
  Encoding encoding = Encoding::kRaw;
};

// Where encode() puts what the encoding of a chunk lost, and the CRC-32C of that.
struct Lost {
  std::uint8_t* to = nullptr;
  std::uint32_t checksum = 0;
};

// What an error says of a body that is refused.
std::string undecodable(std::uint64_t index, const char* why);

class Codec {
 public:
  // Throws Error{kConfig} for a share out of range, and for lossless without its functions, and
  // Error{kLayout} for chunks that no frame can hold.
  Codec(std::shared_ptr<const Layout> layout, CodecOptions options, Lz4 lz4 = {});

  const CodecOptions& options() const noexcept { return options_; }
  const Layout& layout() const noexcept { return *layout_; }

  // Encodes chunk `index` into `body` and returns its encoding. `values`, and `base` and `residual`
  // where not nullptr, point at the chunk's flat bytes: what an encoded run stands for is values -
  // base + residual, what a raw run holds is values + residual, both after the stages. Throws Error{kNonFinite}, naming
  // tensor and element, where an encoded run holds NaN or infinity, and Error{kLayout} for an index
  // past the end. Where `lost` is not nullptr, the body is checked as a receiver checks it
  // (Error{kProtocol}), and what carry() makes of what it decodes goes there, past the cache; after stages, what
  // they gave takes the place of values + residual.
  std::uint8_t encode(std::uint64_t index, const std::uint8_t* values, const std::uint8_t* base,
                      const std::uint8_t* residual, std::vector<std::uint8_t>& body,
                      Lost* lost = nullptr);

  // The same codec with other stages.
  Codec with_stages(std::vector<std::shared_ptr<const Stage>> stages) const;

  // Gives `use` the differences that encode() would encode, as the last stage gives them: of each
  // float run of the chunk, encoded or raw, part after part. A part begins at a multiple of
  // quantise::kPiece elements of its run. Throws Error{kNonFinite} as encode() does.
  void differences(std::uint64_t index, const std::uint8_t* values, const std::uint8_t* base,
                   const std::uint8_t* residual,
                   const std::function<void(const Run& part, const float* differences)>& use);

  // Looks at all of a body and unpacks it. Returns nullptr, or why the body is refused. What
  // `checked` points at may be scratch, and is valid until the next call.
  const char* check(std::uint64_t index, std::uint8_t encoding_byte, const std::uint8_t* body,
                    std::size_t size, Body& checked);

  // Writes the chunk's flat bytes to `out`: base + the decoded difference, or the difference alone
  // where base is nullptr, each rounded once and limited to the dtype's finite numbers; raw runs as
  // they are. Returns nullptr, or why the body is refused, in which case nothing was written.
  // Throws Error{kLayout} for an index past the end. `out` may be `base` but not the body.
  const char* decode(std::uint64_t index, std::uint8_t encoding_byte, const std::uint8_t* body,
                     std::size_t size, const std::uint8_t* base, std::uint8_t* out);
  void decode(std::uint64_t index, const Body& checked, const std::uint8_t* base,
              std::uint8_t* out) const;

  // residual = values + residual - decoded over the floats of a chunk, 0 elsewhere: what the
  // encoding lost, in the dtypes of the layout. All point at the chunk's flat bytes.
  void carry(std::uint64_t index, const std::uint8_t* values, const std::uint8_t* residual,
             const std::uint8_t* decoded, std::uint8_t* out) const;

 private:
  // A stretch of an unpacked body: one run, encoded or raw.
  struct Segment {
    Run run;
    bool encoded;
    std::size_t offset;
    std::size_t size;
  };

  // A chunk's flat bytes, as encode() takes them; nullptr: there are none.
  struct Chunk {
    Range range;
    const std::uint8_t* values;
    const std::uint8_t* base;
    const std::uint8_t* residual;
    Lost* lost;
  };

  Encoding shorter(const Range& range) const;
  void check_finite(const Chunk& chunk);
  std::uint8_t encode_chunk(const Chunk& chunk, std::vector<std::uint8_t>& body);
  void encode_runs(const Chunk& chunk, Encoding encoding, std::vector<std::uint8_t>& body);
  void encode_run(const Chunk& chunk, Encoding encoding, const Run& run,
                  std::vector<std::uint8_t>& body, std::size_t start);
  void copy_run(const Chunk& chunk, const Run& run, std::uint8_t* body);
  void copy_staged(const Chunk& chunk, const Run& run, std::uint8_t* body);
  void apply_stages(const Run& run, std::size_t first, std::size_t n, float* floats);
  [[noreturn]] void fail_at(const Run& run, std::size_t element) const;
  void load(const Chunk& chunk, const Run& run, std::size_t first, std::size_t n, float* floats);
  float* room_for(std::size_t count);
  void encode_top_k(const Chunk& chunk, const Run& run, std::vector<std::uint8_t>& body,
                    std::size_t start);
  void carry_tile(const Chunk& chunk, const Run& run, std::size_t first, std::size_t n,
                  const float* floats, std::uint8_t* decoded);
  void lose(const Chunk& chunk, const Run& run, RunReader& reader, std::size_t first, std::size_t n,
            const float* floats);
  bool pack(Encoding encoding, const std::vector<std::uint8_t>& plain,
            std::vector<std::uint8_t>& body);
  const char* unpack(Encoding encoding, const Range& range, const std::uint8_t* body,
                     std::size_t size);
  const char* plan(Encoding encoding, const Range& range, const std::uint8_t* plain,
                   std::size_t size);

  std::shared_ptr<const Layout> layout_;
  CodecOptions options_;
  Lz4 lz4_;
  std::vector<Segment> segments_;  // of the current chunk
  std::vector<float> floats_;      // of the current piece and the next one, of top-k the run
  std::vector<std::uint8_t> plain_, shuffled_, decoded_;
};

}  // namespace fedcore
