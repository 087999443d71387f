// Outgoing: the published bytes that are on their way to peers.
//
// Owns the count of what is resident because of it: a chunk counts once, however many peers it goes
// to, and its pages are given back when the last of them has it. A peer may have as many bytes on
// their way as are left of the limit, so that those who read slowly, or not at all, leave room for
// the others. An audience (see Exchange) may have a limit of its own. Where nothing more may go,
// wake_fd() becomes readable when something may again.
// Thread-safe: chunks end their way on the socket's thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "base/mapped_file.hpp"

namespace fedcore {

class Outgoing : public std::enable_shared_from_this<Outgoing> {
 public:
  static constexpr std::uint64_t kDefaultLimit = 64u << 20;

  // Throws Error{kStorage} if the process has no descriptor left.
  static std::shared_ptr<Outgoing> make();
  ~Outgoing();
  Outgoing(const Outgoing&) = delete;
  Outgoing& operator=(const Outgoing&) = delete;

  // Sets the limit of an audience; 0: that of all that have none.
  void limit(std::uint64_t bytes, std::uint64_t audience = 0);

  // Whether a chunk may go to a peer of an audience now. A peer with nothing on its way always gets
  // one where the limit is not reached.
  bool may_go(const std::string& peer, const std::uint8_t* data, std::uint64_t size,
              std::uint64_t audience = 0);

  // Counts a chunk of `file` until the last copy of what is returned is gone: the file itself, kept
  // alive.
  std::shared_ptr<MappedFile> send(const std::string& peer, std::shared_ptr<MappedFile> file,
                                   const std::uint8_t* data, std::uint64_t size,
                                   std::uint64_t audience = 0);

  int wake_fd() const noexcept { return wake_fd_; }
  // Makes wake_fd() readable, for what another thread has done.
  void wake() noexcept;
  void clear_wake() noexcept;
  std::uint64_t bytes() const;

 private:
  struct Chunk;
  struct Share {
    std::uint64_t limit = kDefaultLimit;
    std::uint64_t bytes = 0;
  };
  struct Pages {
    std::uint64_t size;
    std::uint64_t users;
    Share* share;  // in which they count
  };

  explicit Outgoing(int wake_fd) : wake_fd_(wake_fd) {}
  void done(const Chunk& chunk) noexcept;
  Share& share_of(std::uint64_t audience);

  const int wake_fd_;
  mutable std::mutex mutex_;
  std::map<std::uint64_t, Share> shares_{{0, {kDefaultLimit}}};  // by audience; none goes away
  bool waited_for_ = false;
  std::unordered_map<const std::uint8_t*, Pages> pages_;
  std::unordered_map<std::string, std::uint64_t> by_peer_;
};

}  // namespace fedcore
