// Pace: how fast the chunks of one source come, and what follows from it: how many to ask for
// ahead, and how long to wait for the next.
//
// What is under way at a time is about a second's worth, and at least one chunk, so that a
// heartbeat is never behind much more than that in the queue of a slow link. It begins with one
// chunk and grows with each that comes in time. Patience is a few times what a chunk took lately;
// the first one, of whose speed nothing is known, has a minute. The clock is an argument; it never
// changes a byte of what is collected. Not thread-safe.
#pragma once

#include <cstdint>
#include <deque>

namespace fedcore {

class Pace {
 public:
  static constexpr std::int64_t kAheadMs = 1000;
  static constexpr std::int64_t kFirstMs = 60'000;
  static constexpr std::int64_t kPatience = 4;  // times the recent time per chunk
  static constexpr std::uint64_t kMaxAhead = 1u << 16;

  // What is known of a source when its next collection begins.
  struct Known {
    std::uint64_t ahead = 1;
    double chunk_ms = -1;  // recent time per chunk; negative: none has come
  };

  void start(const Known& known) noexcept { known_ = known; }
  const Known& known() const noexcept { return known_; }

  void asked(std::int64_t now_ms, std::uint32_t count);
  // One of the chunks that were asked for has come, whole or not.
  void came(std::int64_t now_ms) noexcept;
  // What was asked for is waited for no longer.
  void forget_asked() noexcept { asked_.clear(); }

  // Chunks that may be under way.
  std::uint64_t ahead() const noexcept { return known_.ahead; }
  // How long nothing at all may come while chunks are under way.
  std::int64_t patience_ms() const noexcept;

 private:
  struct Asked {
    std::int64_t at_ms;
    std::uint32_t left;
  };

  Known known_;
  std::deque<Asked> asked_;  // in order: a source answers in order
  std::int64_t came_ms_ = 0;
};

}  // namespace fedcore
