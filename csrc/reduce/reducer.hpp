// Reducer: K chunks of one layout -> one chunk, in one pass, by a rule (rule.hpp).
//
// Owns the rule's Combiner. Inputs are always combined in the order given at construction, so the
// result does not depend on arrival. reduce() is not reentrant (it uses scratch of its own): one
// thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "codec/codec.hpp"
#include "codec/run_reader.hpp"
#include "format/layout.hpp"
#include "reduce/rule.hpp"
#include "reduce/view.hpp"

namespace fedcore {

// The first non-finite value of a block: which input, and its flat byte offset.
struct BadValue {
  std::size_t source;
  std::uint64_t byte_offset;
};

// What takes combined values of float dtypes before they are rounded, and writes elements of the
// output in their place: a finisher. It is called with pieces of kernels::kPiece elements or fewer,
// in the order of their places, and perhaps more than once for a chunk.
class Finish {
 public:
  virtual ~Finish() = default;
  // `n` elements from the flat byte `offset` on, in binary64. `base` (or nullptr) and `out` point at
  // those elements, and need no alignment.
  virtual void apply(Dtype dtype, std::uint64_t offset, const double* combined,
                     const std::uint8_t* base, std::uint8_t* out, std::size_t n) = 0;
};

class Reducer {
 public:
  // Throws what check_weights() throws. `finish`, if any, outlives the reducer. `plain`: flat bytes
  // of the layout, in order and apart, whose float elements get the mean whatever the rule is: that of the
  // first `plain_inputs` inputs, or of all (0). For rules without views, and not for fold().
  Reducer(const Rule& rule, const std::vector<double>& weights, Finish* finish = nullptr,
          std::vector<Range> plain = {}, std::size_t plain_inputs = 0);

  std::size_t sources() const noexcept { return bodies_.size(); }

  // Combines the flat bytes of `range`, which inputs hold as they are or as an encoded body of one
  // chunk, the difference to `base`. base (or nullptr) and out point at the range's first byte.
  // What is encoded is decoded on the device, if one is in use that can, else a piece at a time,
  // into the cache. Returns a non-finite input value, in which case `out` is not to be used. Throws
  // the RuleError of a rule that fails; its message names tensor and element.
  std::optional<BadValue> reduce(const Layout& layout, Range range, const Body* inputs,
                                 const std::uint8_t* base, std::uint8_t* out);

  // The same with one input after the other, from input 0 on, for a range whose inputs are not
  // there together and a rule that folds; `out` collects what is not combined. A non-finite input
  // changes nothing. finish() follows the last input and writes the bits that reduce() gives.
  std::optional<BadValue> fold(const Layout& layout, Range range, std::size_t source,
                               const Body& input, const std::uint8_t* base, std::uint8_t* out);
  void finish(const Layout& layout, Range range, const std::uint8_t* base, std::uint8_t* out);

  // Of a rule with views: makes the flat bytes of `range` of the output from a view of each source.
  // `base` (needed for integers) and out point at the range's first byte. Returns the flat byte
  // offset of a result that is NaN or infinite, in which case `out` is not to be used.
  std::optional<std::uint64_t> reduce_views(const Layout& layout, Range range,
                                            std::span<const View> views, const std::uint8_t* base,
                                            std::uint8_t* out);

 private:
  bool finishes(Dtype dtype) const noexcept { return finish_ != nullptr && is_float(dtype); }
  std::size_t sums_of(const Run& run) const noexcept;
  std::optional<BadValue> reduce_runs(const Layout& layout, Range range, const Body* inputs,
                                      const std::uint8_t* base, std::uint8_t* out);
  std::optional<BadValue> reduce_run(const Run& run, const Body* inputs, const std::uint8_t* base,
                                     std::uint8_t* out);
  std::optional<BadValue> reduce_pieces(const Run& run, const Body* inputs,
                                        const std::uint8_t* base, std::uint8_t* out);
  bool combine(Dtype dtype, std::uint64_t offset, const std::uint8_t* base, std::uint8_t* out,
               double* wide, std::size_t count);
  bool combine_stretch(Combiner& combiner, Dtype dtype, std::size_t first, std::size_t count,
                       const std::uint8_t* base, std::uint8_t* out, double* wide);
  bool has_plain(const Run& run) const noexcept;
  bool combine_piece(const Run& run, std::size_t first, std::size_t n, const std::uint8_t* base,
                     std::uint8_t* out);
  std::optional<BadValue> find_bad(Dtype dtype, std::uint64_t offset, std::uint64_t nbytes) const;
  void fold_pieces(const Run& run, std::size_t source, Encoding encoding, const std::uint8_t* body,
                   const std::uint8_t* base, double* sums);
  void finish_pieces(const Run& run, const double* sums, const std::uint8_t* base,
                     std::uint8_t* out);

  const Rule& rule_;
  std::unique_ptr<Combiner> combiner_;
  Finish* finish_;
  const std::vector<Range> plain_;
  std::unique_ptr<Combiner> mean_;           // of those; null where there are none
  std::vector<const std::uint8_t*> bodies_;  // where the current run begins in each input
  std::vector<const void*> pointers_;        // the block that is combined
  std::vector<const void*> shifted_;         // and a stretch of it
  std::uint64_t block_ = 0;                  // its flat byte offset, and its elements' size
  std::size_t width_ = 1;
  std::vector<std::uint8_t> encodings_;  // of the current run in each input
  std::vector<RunReader> readers_;       // of the inputs that the current run is encoded in
  std::vector<std::uint8_t> pieces_;     // what those hold, decoded
  std::vector<double> wide_;             // a piece for finish_
  std::vector<double> sums_;             // of fold()
};

}  // namespace fedcore
