#include "base/workers.hpp"

#include <algorithm>
#include <csignal>
#include <utility>

namespace fedcore {
namespace {

constexpr std::size_t kStackBytes = 512u << 10;

}  // namespace

Workers::~Workers() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  more_.notify_all();
  for (const pthread_t thread : started_) {
    pthread_join(thread, nullptr);
  }
}

void Workers::start(unsigned wanted) {
  if (started_.size() >= wanted) {
    return;
  }
  started_.reserve(wanted);
  sigset_t all, before;
  sigfillset(&all);
  for (const int own : {SIGBUS, SIGSEGV, SIGFPE, SIGILL}) {
    sigdelset(&all, own);  // what a thread itself does wrong: blocked, it would end the process
  }
  pthread_sigmask(SIG_SETMASK, &all, &before);  // a thread begins with its maker's mask
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kStackBytes);
  const auto body = [](void* self) -> void* {
    static_cast<Workers*>(self)->work();
    return nullptr;
  };
  while (started_.size() < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, &attributes, body, this) != 0) {
      threads_ = static_cast<unsigned>(started_.size()) + 1;  // there are no more to be had
      break;
    }
    started_.push_back(thread);
  }
  pthread_attr_destroy(&attributes);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Workers::run(unsigned count, const std::function<void(unsigned)>& part) {
  if (count > 1 && threads_ > 1) {
    start(std::min(threads_, count) - 1);
  }
  std::unique_lock lock(mutex_);
  part_ = &part;
  next_ = 0;
  count_ = left_ = count;
  if (count > 1) {
    more_.notify_all();
  }
  take(lock);
  done_.wait(lock, [this] { return left_ == 0; });
  part_ = nullptr;
  if (error_) {
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void Workers::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    more_.wait(lock, [this] { return stop_ || next_ < count_; });
    if (stop_) {
      return;
    }
    take(lock);
  }
}

// Does parts until none is left to take; the lock is held but while one is done.
void Workers::take(std::unique_lock<std::mutex>& lock) {
  while (next_ < count_) {
    const unsigned mine = next_++;
    const auto& part = *part_;
    lock.unlock();
    std::exception_ptr error;
    try {
      part(mine);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !error_) {
      error_ = error;
    }
    if (--left_ == 0) {
      done_.notify_one();
    }
  }
}

}  // namespace fedcore
