// View: what a rule sees of one source while it makes one chunk of the output (rule.hpp): flat bytes
// of the source's own layout, where they lie in memory, and those of the source's base.
//
// Owns the list of chunks alone; the bytes are the collector's. Not thread-safe. Cost: a search among
// the chunks of the view for each piece that is read.
#pragma once

#include <cstdint>
#include <map>

#include "format/layout.hpp"

namespace fedcore {

// `count` elements of a float dtype as binary64 numbers; `from` needs no alignment.
void widen(Dtype dtype, const void* from, double* to, std::size_t count);

class View {
 public:
  // `base`: the flat bytes of the source's base, or nullptr. Both outlive the view.
  explicit View(const Layout& layout, const std::uint8_t* base = nullptr)
      : layout_(&layout), base_(base) {}

  // Shows the flat bytes of one chunk.
  void show(std::uint64_t chunk, const std::uint8_t* bytes) { chunks_[chunk] = bytes; }

  const Layout& layout() const noexcept { return *layout_; }

  // `count` elements of a float dtype from flat byte `offset` on, as binary64 numbers: as the source
  // has them, or their differences to its base. Throws Error{kLayout} for elements that were not
  // among what the rule needs, and Error{kConfig} for differences without a base.
  void values(Dtype dtype, std::uint64_t offset, double* out, std::size_t count) const;
  void differences(Dtype dtype, std::uint64_t offset, double* out, std::size_t count) const;

 private:
  const Layout* layout_;
  const std::uint8_t* base_;
  std::map<std::uint64_t, const std::uint8_t*> chunks_;
};

}  // namespace fedcore
