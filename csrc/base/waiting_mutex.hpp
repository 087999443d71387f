// WaitingMutex: a mutex whose owner may need something that a waiting thread has, such as Python's
// GIL. Its maker says how a thread waits: the thread gives that thing up, waits, and takes it back
// once it has the mutex. A free mutex costs no more than a std::mutex.
#pragma once

#include <mutex>

namespace fedcore {

class WaitingMutex {
 public:
  // Locks a mutex that another thread has.
  using Wait = void (*)(std::mutex& mutex);

  explicit WaitingMutex(Wait wait = nullptr) noexcept : wait_(wait) {}

  void lock() {
    if (wait_ == nullptr) {
      mutex_.lock();
    } else if (!mutex_.try_lock()) {
      wait_(mutex_);
    }
  }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  const Wait wait_;
};

}  // namespace fedcore
