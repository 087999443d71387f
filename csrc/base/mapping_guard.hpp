// Mapping guard: a mapped file that becomes shorter does not end the process.
//
// A read beyond the new end of such a file raises SIGBUS. The guard's handler puts zeros in the
// place of what is gone, from the page that was read to the end of the mapping, and marks the
// mapping. Whoever uses what was read asks for the mark first: MappedFile::check_whole(). The
// same goes for pages that the disk can't read. What the guard does not know goes to the handler
// that was there before. A handler that somebody sets later comes first until the next mapping is
// made, or until arm() is called, which goes before each larger stretch of reads.
//
// Slots are few and fixed, as a signal handler can't take a lock; a mapping beyond them is not
// guarded. Methods are usable from any thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedcore {

class MappingGuard {
 public:
  MappingGuard() = default;
  ~MappingGuard() { forget(); }
  MappingGuard(const MappingGuard&) = delete;
  MappingGuard& operator=(const MappingGuard&) = delete;

  // Puts the guard's handler in front of one that was set since. Costs one system call.
  static void arm() noexcept;

  // Guards a mapping in place of the one before. To be called before the old one is unmapped.
  void watch(const void* data, std::uint64_t size) noexcept;

  // Guards nothing any more. To be called before the mapping is unmapped.
  void forget() noexcept;

  // Whether a page of it could not be read.
  bool broken() const noexcept;

 private:
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  std::size_t slot_ = kNone;
};

}  // namespace fedcore
