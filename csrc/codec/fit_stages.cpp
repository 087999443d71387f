#include "codec/fit_stages.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "base/workers.hpp"

namespace fedcore {
namespace {

// What the workers of one first pass share.
class FirstPass {
 public:
  FirstPass(const Codec& before, const Stage& stage, const UpdateFiles& files,
            const std::function<void()>& progress)
      : before_(before),
        stage_(stage),
        files_(files),
        progress_(progress),
        caller_(std::this_thread::get_id()),
        sums_(before.layout().chunk_count()) {}

  // Sums up chunks until none is left, or one has failed. A chunk that was taken is done, so the
  // first one that fails is always found.
  void work() {
    Codec codec = before_;
    while (!stop_) {
      const std::uint64_t index = next_.fetch_add(1);
      if (index >= sums_.size()) {
        return;
      }
      try {
        sum(codec, index);
        if (progress_ && std::this_thread::get_id() == caller_) {
          progress_();
        }
      } catch (...) {
        fail(index);
        return;
      }
    }
  }

  StageSums result() const {
    if (error_) {
      std::rethrow_exception(error_);
    }
    return add_up(sums_);
  }

 private:
  void sum(Codec& codec, std::uint64_t index) {
    const Range range = codec.layout().chunk_range(index);
    const auto at = [&](const FlatBytes& flat) {
      return flat.file ? flat.file->data() + flat.offset + range.offset : nullptr;
    };
    codec.differences(index, at(files_.values), at(files_.base), at(files_.residual),
                      [&](const Run& part, const float* differences) {
                        stage_.sum(part, differences, sums_[index]);
                      });
    for (const FlatBytes* flat : {&files_.values, &files_.base, &files_.residual}) {
      if (flat->file) {
        flat->file->release(flat->offset + range.offset, range.nbytes);
      }
    }
  }

  // Called where an exception is handled. Of several chunks that fail, the first one's error stays.
  void fail(std::uint64_t index) {
    stop_ = true;
    const std::lock_guard hold(mutex_);
    if (!error_ || index < failed_) {
      error_ = std::current_exception();
      failed_ = index;
    }
  }

  const Codec& before_;
  const Stage& stage_;
  const UpdateFiles& files_;
  const std::function<void()>& progress_;
  const std::thread::id caller_;
  std::vector<StageSums> sums_;  // each chunk's thread fills its entry
  std::atomic<std::uint64_t> next_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  // Under the lock:
  std::exception_ptr error_;
  std::uint64_t failed_ = 0;
};

}  // namespace

StageSums add_up(const std::vector<StageSums>& of_chunks) noexcept {
  StageSums total{};
  for (const StageSums& sums : of_chunks) {
    for (std::size_t lane = 0; lane < total.size(); ++lane) {
      total[lane] += sums[lane];
    }
  }
  return total;
}

Codec fit_stages(const Codec& codec, const UpdateFiles& files, unsigned threads,
                 const std::function<void()>& progress, std::vector<double>& figures) {
  Stages fitted;
  figures.assign(codec.options().stages.size(), 0);
  for (const auto& stage : codec.options().stages) {
    if (!stage->asks_first()) {
      fitted.push_back(stage);
      continue;
    }
    const Codec before = codec.with_stages(fitted);
    FirstPass pass(before, *stage, files, progress);
    Workers workers(threads);
    workers.run(threads, [&pass](unsigned) { pass.work(); });
    const StageSums sums = pass.result();
    figures[fitted.size()] = stage->figure(sums);
    fitted.push_back(stage->fitted(sums));
  }
  return codec.with_stages(std::move(fitted));
}

std::vector<std::size_t> checked_stages(const Codec& codec) {
  std::vector<std::size_t> checked;
  const Stages& stages = codec.options().stages;
  for (std::size_t i = stages.size(); i > 0 && stages[i - 1]->bounds(); --i) {
    checked.push_back(i - 1);
  }
  return checked;
}

std::optional<Codec> tighten_stages(const Codec& codec, const std::vector<std::size_t>& checked,
                                    const std::vector<StageSums>& decoded) {
  Stages stages = codec.options().stages;
  bool any = false;
  for (std::size_t i = 0; i < checked.size(); ++i) {
    if (auto tighter = stages[checked[i]]->tightened(decoded[i])) {
      stages[checked[i]] = std::move(tighter);
      any = true;
    }
  }
  return any ? std::optional(codec.with_stages(std::move(stages))) : std::nullopt;
}

}  // namespace fedcore
