// Workers: every part of every job once, on several threads, and errors after all have ended.
#include "base/workers.hpp"

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"

namespace {

using fedcore::Workers;

void every_part_of_every_job_is_done_once() {
  Workers workers(4);
  for (unsigned count : {1u, 2u, 4u, 9u, 0u, 64u}) {
    for (int job = 0; job < 200; ++job) {
      std::vector<int> done(count, 0);  // plain: a part that two threads took is a race
      workers.run(count, [&](unsigned part) { ++done[part]; });
      for (const int times : done) {
        CHECK(times == 1);
      }
    }
  }
}

void parts_are_done_at_the_same_time_by_threads_that_take_no_signals() {
  constexpr unsigned kParts = 3;
  Workers workers(kParts);
  std::mutex mutex;
  std::condition_variable all_here;
  std::set<std::thread::id> threads;
  unsigned blocked = 0;
  workers.run(kParts, [&](unsigned) {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    std::unique_lock lock(mutex);
    blocked += sigismember(&mask, SIGINT) == 1 ? 1 : 0;
    threads.insert(std::this_thread::get_id());
    all_here.notify_all();
    all_here.wait(lock, [&] { return threads.size() == kParts; });
  });
  CHECK(threads.size() == kParts);
  CHECK(blocked == kParts - 1);  // all but the caller
}

void an_error_comes_when_all_parts_have_ended_and_ends_nothing_else() {
  Workers workers(3);
  for (int job = 0; job < 100; ++job) {
    std::atomic<int> ended{0};
    std::string why;
    try {
      workers.run(6, [&](unsigned part) {
        if (part == 2) {
          ++ended;
          throw std::runtime_error("part 2");
        }
        ++ended;
      });
    } catch (const std::runtime_error& error) {
      why = error.what();
    }
    CHECK(why == "part 2");
    CHECK(ended == 6);
    ended = 0;
    workers.run(6, [&](unsigned) { ++ended; });
    CHECK(ended == 6);
  }
}

}  // namespace

int main() {
  every_part_of_every_job_is_done_once();
  parts_are_done_at_the_same_time_by_threads_that_take_no_signals();
  an_error_comes_when_all_parts_have_ended_and_ends_nothing_else();
}
