// Hold-ups: times in which the pump did not read, because what it delivered took long.
//
// A rule may compute for seconds in the pump's thread, and a thread that holds the exchange's lock
// keeps the pump waiting. What peers send meanwhile lies unread: it is no silence
// of theirs. The time is the system's, also where the exchange's clock is driven by hand.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace fedcore {

class HoldUps {
 public:
  static constexpr std::int64_t kLongMs = 100;  // less is no hold-up

  // While one lives, the pump is at work and reads nothing.
  class Turn {
   public:
    explicit Turn(HoldUps& of) : of_(of) { of_.since_ms_ = began_ms_; }
    ~Turn() {
      const std::int64_t took = now_ms() - began_ms_;
      of_.done_ms_ += took >= kLongMs ? took : 0;
      of_.since_ms_ = kNone;
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    HoldUps& of_;
    const std::int64_t began_ms_ = now_ms();
  };

  // Milliseconds in hold-ups so far, the present one included. Safe from any thread.
  std::int64_t total_ms() const noexcept {
    const std::int64_t done = done_ms_;
    const std::int64_t since = since_ms_;
    const std::int64_t now = since == kNone ? 0 : now_ms() - since;
    return done + (now >= kLongMs ? now : 0);
  }

 private:
  static constexpr std::int64_t kNone = -1;

  static std::int64_t now_ms() noexcept {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(since).count();
  }

  std::atomic<std::int64_t> done_ms_ = 0;
  std::atomic<std::int64_t> since_ms_ = kNone;
};

}  // namespace fedcore
