#include "transfer/outgoing.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.hpp"

#if defined(__linux__)
#include <sys/eventfd.h>
#endif

namespace fedcore {

struct Outgoing::Chunk {
  std::shared_ptr<Outgoing> counted_by;
  std::shared_ptr<MappedFile> file;
  std::string peer;
  const std::uint8_t* data;
  std::uint64_t size;

  Chunk(std::shared_ptr<Outgoing> outgoing, std::shared_ptr<MappedFile> from, std::string to,
        const std::uint8_t* bytes, std::uint64_t count)
      : counted_by(std::move(outgoing)),
        file(std::move(from)),
        peer(std::move(to)),
        data(bytes),
        size(count) {}
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;
  ~Chunk() { counted_by->done(*this); }
};

std::shared_ptr<Outgoing> Outgoing::make() {
#if defined(__linux__)
  const int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) {
    throw Error(Errc::kStorage, std::string("cannot make an event descriptor: ") +
                                    std::strerror(errno) + "; raise the limit of open files");
  }
#else
  const int fd = -1;  // nothing is held back there
#endif
  return std::shared_ptr<Outgoing>(new Outgoing(fd));
}

Outgoing::~Outgoing() {
  if (wake_fd_ >= 0) {
    ::close(wake_fd_);
  }
}

void Outgoing::limit(std::uint64_t bytes, std::uint64_t audience) {
  const std::lock_guard lock(mutex_);
  shares_[audience].limit = bytes;
}

Outgoing::Share& Outgoing::share_of(std::uint64_t audience) {
  const auto found = shares_.find(audience);
  return found == shares_.end() ? shares_[0] : found->second;
}

bool Outgoing::may_go(const std::string& peer, const std::uint8_t* data, std::uint64_t size,
                      std::uint64_t audience) {
  const std::lock_guard lock(mutex_);
  if (wake_fd_ < 0) {
    return true;
  }
  const auto found = by_peer_.find(peer);
  const std::uint64_t on_its_way = found == by_peer_.end() ? 0 : found->second;
  const std::uint64_t more = pages_.contains(data) ? 0 : size;
  const Share& share = share_of(audience);
  const std::uint64_t left = share.limit > share.bytes ? share.limit - share.bytes : 0;
  const bool room = share.bytes == 0 || more <= left;
  if (room && (on_its_way == 0 || on_its_way + size <= left)) {
    return true;
  }
  waited_for_ = true;
  return false;
}

std::shared_ptr<MappedFile> Outgoing::send(const std::string& peer,
                                           std::shared_ptr<MappedFile> file,
                                           const std::uint8_t* data, std::uint64_t size,
                                           std::uint64_t audience) {
  MappedFile* const raw = file.get();
  auto chunk = std::make_shared<Chunk>(shared_from_this(), std::move(file), peer, data, size);
  const std::lock_guard lock(mutex_);
  by_peer_[peer] += size;
  const auto found = pages_.try_emplace(data, Pages{size, 0, &share_of(audience)}).first;
  if (found->second.users++ == 0) {
    found->second.share->bytes += size;
  }
  return {std::move(chunk), raw};
}

void Outgoing::done(const Chunk& chunk) noexcept {
  bool wake = false;
  {
    const std::lock_guard lock(mutex_);
    const auto peer = by_peer_.find(chunk.peer);
    if (peer != by_peer_.end()) {
      peer->second -= std::min(peer->second, chunk.size);
      if (peer->second == 0) {
        by_peer_.erase(peer);
      }
    }
    const auto pages = pages_.find(chunk.data);
    if (pages != pages_.end() && --pages->second.users == 0) {
      // Under the lock, so that nobody makes them resident for another peer in between.
      chunk.file->release(static_cast<std::uint64_t>(chunk.data - chunk.file->data()), chunk.size);
      pages->second.share->bytes -= pages->second.size;
      pages_.erase(pages);
    }
    wake = std::exchange(waited_for_, false);
  }
  if (wake) {
    this->wake();
  }
}

void Outgoing::wake() noexcept {
  const std::uint64_t one = 1;
  if (wake_fd_ >= 0) {
    static_cast<void>(::write(wake_fd_, &one, sizeof one) == sizeof one);
  }
}

void Outgoing::clear_wake() noexcept {
  std::uint64_t count = 0;
  if (wake_fd_ >= 0) {
    static_cast<void>(::read(wake_fd_, &count, sizeof count) == sizeof count);
  }
}

std::uint64_t Outgoing::bytes() const {
  const std::lock_guard lock(mutex_);
  std::uint64_t all = 0;
  for (const auto& [audience, share] : shares_) {
    all += share.bytes;
  }
  return all;
}

}  // namespace fedcore
