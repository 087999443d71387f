// Workers: threads that do the parts of one job beside the thread that has it.
//
// Owns its threads: started when a job first has parts for them, joined by the destructor. Where
// the system gives no more threads, those that there are do it all. One job at a time: run() is
// called by one thread and returns when every part is done, so the parts may use its memory.
// Signals of the process go to other threads. Cost: a lock and a wake-up for each part, worth it from about 100
// microseconds a part; and a stack of half a MiB for each thread but the caller's, as the
// system's own of 8 would show in a limit of memory.
#pragma once

#include <pthread.h>

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <vector>

namespace fedcore {

class Workers {
 public:
  // So many threads do a job, the caller's among them.
  explicit Workers(unsigned threads) noexcept : threads_(threads) {}
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Calls part(0) to part(count - 1), each once, on any of the threads. Throws what the first
  // of them threw, after all have ended.
  void run(unsigned count, const std::function<void(unsigned)>& part);

 private:
  void start(unsigned wanted);
  void work();
  void take(std::unique_lock<std::mutex>& lock);

  unsigned threads_;                // the caller's alone
  std::vector<pthread_t> started_;  // too
  std::mutex mutex_;
  std::condition_variable more_, done_;
  // Of the current job, under the lock:
  const std::function<void(unsigned)>* part_ = nullptr;
  unsigned next_ = 0;  // first part that nobody has taken
  unsigned count_ = 0;
  unsigned left_ = 0;  // parts that are not done
  std::exception_ptr error_;
  bool stop_ = false;
};

}  // namespace fedcore
