// Silence: whether a site's one connection still carries anything.
//
// The site sends a ping each interval and the server answers each. A connection on which nothing
// comes for a few intervals is dead, also where the system knows nothing of it: a proxy in between
// may still acknowledge what is sent. What the system has received, and acknowledged data beyond
// what pings take, are signs of life: a long message is nothing before its end, and pings queue
// behind data. A proxy may hold data that it has acknowledged. So what was sent and is not proved
// to have arrived (by the answer to a ping that was sent after it) prolongs the patience, by a few
// times what it would take at the speed known. The clock is an argument. Not thread-safe: Exchange
// holds the lock.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fedcore {

class Silence {
 public:
  static constexpr std::int64_t kBeats = 5;        // intervals without any answer
  static constexpr std::int64_t kFirstBeats = 20;  // the same on a connection that never answered
  static constexpr std::int64_t kSlowMs = 3000;    // an answer takes longer: the link is slow
  static constexpr double kPatience = 4;           // times what the bytes under way would take
  static constexpr double kFirstRate = 64;         // bytes per millisecond, before any is known
  static constexpr std::int64_t kData = 1024;      // acknowledged in an interval: more than pings

  // Another connection is used from now on.
  void dialled(std::int64_t now_ms) noexcept {
    since_ms_ = now_ms;
    answered_ = false;
    pings_ = 0;
    first_ = later_ = {};
    received_ = acked_ = -1;
  }

  void pinged() noexcept { ++pings_; }

  // Something else than a ping was sent, of so many bytes.
  void sent(std::uint64_t bytes, std::int64_t now_ms) noexcept {
    Sent& batch = first_.bytes == 0 ? first_ : later_;
    if (batch.bytes == 0) {
      batch.since_ms = now_ms;
    }
    batch.bytes += bytes;
    batch.pongs = pings_ + 1;
  }

  void heard(bool pong, std::int64_t now_ms) noexcept {
    since_ms_ = now_ms;
    answered_ = true;
    if (!pong) {
      return;
    }
    pings_ -= pings_ > 0 ? 1 : 0;
    later_.pongs -= later_.pongs > 0 ? 1 : 0;
    if (first_.bytes > 0 && --first_.pongs <= 0) {
      learn(first_.bytes, now_ms - first_.since_ms);
      first_ = later_;
      first_.pongs = std::max<std::int64_t>(1, first_.pongs);
      later_ = {};
    }
  }

  // What the system has received of the connection so far, and what of that which was sent is
  // acknowledged, as it is looked at now and then; negative: not known.
  void moved(std::int64_t received, std::int64_t acked, std::int64_t now_ms) noexcept {
    const bool came = received_ >= 0 && received > received_;
    const bool went = acked_ >= 0 && acked >= acked_ + kData;
    since_ms_ = came || went ? now_ms : since_ms_;
    received_ = received;
    acked_ = acked;
  }

  // Until when nothing may come. `busy_until_ms`: chunks that are due may keep answers back until
  // then, which counts where it is not known what the system has received.
  std::int64_t until_ms(std::int64_t interval_ms, std::int64_t busy_until_ms) const noexcept {
    const auto under_way = static_cast<double>(first_.bytes + later_.bytes);
    const std::int64_t until = since_ms_ + (answered_ ? kBeats : kFirstBeats) * interval_ms +
                               static_cast<std::int64_t>(kPatience * under_way / rate_);
    return received_ >= 0 ? until : std::max(until, busy_until_ms);
  }

 private:
  struct Sent {
    std::uint64_t bytes = 0;
    std::int64_t since_ms = 0;
    std::int64_t pongs = 0;  // which have to come before it is proved to have arrived
  };

  // That so many bytes were answered for after that time. It holds the wait for the next ping, too,
  // so it is no measure of a slow link unless it is longer than that.
  void learn(std::uint64_t bytes, std::int64_t took_ms) noexcept {
    const auto took = static_cast<double>(std::max<std::int64_t>(1, took_ms));
    const double rate = static_cast<double>(bytes) / took;
    if (rate > rate_ || took_ms > kSlowMs) {
      rate_ = rate;
    }
  }

  std::int64_t since_ms_ = 0;  // the last sign of life, or the dial
  bool answered_ = false;      // since the dial
  std::int64_t pings_ = 0;     // without an answer yet
  Sent first_, later_;  // what is not proved to have arrived: the oldest, and what was sent since
  double rate_ = kFirstRate;
  std::int64_t received_ = -1, acked_ = -1;
};

}  // namespace fedcore
