#include "base/mapping_guard.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <mutex>

namespace fedcore {
namespace {

constexpr std::size_t kSlots = 1024;
constexpr std::size_t kHandlers = 64;

// `from` is 0 in a free slot. The handler reads without a lock: a slot is filled with `from` last
// and emptied with `from` first.
struct Slot {
  std::atomic<std::uintptr_t> from{0};
  std::atomic<std::uintptr_t> to{0};
  std::atomic<bool> broken{false};
};

// What a signal handler needs has to be global.
std::array<Slot, kSlots> slots;                  // NOLINT(bugprone-dynamic-static-initializers)
std::array<struct sigaction, kHandlers> others;  // the handlers that were there, each once
std::atomic<std::size_t> last{0};  // one after the place of the one that was there last
std::size_t known = 0;             // how many there are
std::atomic<bool> passing{false};
std::atomic<std::uintptr_t> page{4096};  // bytes of a page
std::mutex filling;

void end_by(int number) {
  struct sigaction plain{};
  plain.sa_handler = SIG_DFL;
  sigaction(number, &plain, nullptr);
  static_cast<void>(raise(number));
}

void pass_on(int number, siginfo_t* info, void* context) {
  const std::size_t place = last.load(std::memory_order_acquire);
  // A handler that raises the signal once more for the one before it comes back here.
  if (place == 0 || passing.exchange(true)) {
    end_by(number);
    return;
  }
  const struct sigaction& before = others[place - 1];
  if ((before.sa_flags & SA_SIGINFO) != 0 && before.sa_sigaction != nullptr) {
    before.sa_sigaction(number, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(number);
  } else {
    end_by(number);
  }
  passing.store(false);
}

void on_bus(int number, siginfo_t* info, void* context) {
  const int code = errno;
  const auto at = reinterpret_cast<std::uintptr_t>(info->si_addr);
  if (info->si_code == BUS_ADRERR) {
    for (Slot& slot : slots) {
      const std::uintptr_t from = slot.from.load(std::memory_order_acquire);
      const std::uintptr_t to = slot.to.load(std::memory_order_relaxed);
      if (from == 0 || at < from || at >= to) {
        continue;
      }
      const std::uintptr_t start =
          at / page.load(std::memory_order_relaxed) * page.load(std::memory_order_relaxed);
      // NOLINTNEXTLINE(performance-no-int-to-ptr)
      void* const address = reinterpret_cast<void*>(start);
      slot.broken.store(true, std::memory_order_release);
      if (mmap(address, to - start, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS,
               -1, 0) == address) {
        errno = code;
        return;
      }
    }
  }
  errno = code;
  pass_on(number, info, context);
}

bool is_same(const struct sigaction& one, const struct sigaction& other) {
  const bool full = (one.sa_flags & SA_SIGINFO) != 0;
  if (full != ((other.sa_flags & SA_SIGINFO) != 0)) {
    return false;
  }
  return full ? one.sa_sigaction == other.sa_sigaction : one.sa_handler == other.sa_handler;
}

bool is_own(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == on_bus;
}

// Puts the handler in the place of whatever is there. Since the last mapping a library may have set
// its own, as Python's faulthandler does, or the default again, as Lightning does after each fit.
void install() {
  struct sigaction there{};
  if (sigaction(SIGBUS, nullptr, &there) != 0 || is_own(there)) {
    return;
  }
  std::size_t place = 0;
  while (place < known && !is_same(others[place], there)) {
    ++place;
  }
  if (place == kHandlers) {
    return;
  }
  if (place == known) {
    others[known++] = there;
  }
  last.store(place + 1, std::memory_order_release);
  page.store(static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE)), std::memory_order_relaxed);
  struct sigaction action{};
  action.sa_sigaction = on_bus;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, nullptr);
}

}  // namespace

void MappingGuard::arm() noexcept {
  struct sigaction there{};
  if (sigaction(SIGBUS, nullptr, &there) != 0 || is_own(there)) {
    return;
  }
  const std::lock_guard lock(filling);
  install();
}

void MappingGuard::forget() noexcept {
  if (slot_ != kNone) {
    slots[slot_].from.store(0, std::memory_order_release);
    slot_ = kNone;
  }
}

void MappingGuard::watch(const void* data, std::uint64_t size) noexcept {
  const std::lock_guard lock(filling);
  install();
  const auto from = reinterpret_cast<std::uintptr_t>(data);
  for (std::size_t i = 0; slot_ == kNone && i < kSlots; ++i) {
    if (slots[i].from.load(std::memory_order_relaxed) == 0) {
      slot_ = i;
      slots[i].broken.store(false, std::memory_order_relaxed);
    }
  }
  if (slot_ != kNone) {
    slots[slot_].from.store(0, std::memory_order_release);
    slots[slot_].to.store(from + static_cast<std::uintptr_t>(size), std::memory_order_release);
    slots[slot_].from.store(from, std::memory_order_release);
  }
}

bool MappingGuard::broken() const noexcept {
  return slot_ != kNone && slots[slot_].broken.load(std::memory_order_acquire);
}

}  // namespace fedcore
