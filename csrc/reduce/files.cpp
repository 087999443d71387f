#include "reduce/files.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <tuple>

#include "base/error.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {
namespace {

constexpr std::uint64_t kFileBlock = 1u << 20;

struct Block {
  std::size_t tensor;
  std::uint64_t offset;
  std::uint64_t nbytes;
};

// What the workers of one reduce_files call share.
class FileJob {
 public:
  FileJob(const std::vector<std::shared_ptr<MappedFile>>& inputs,
          const std::vector<std::uint64_t>& weights, const std::vector<FileTensor>& tensors,
          MappedFile& out, const Rule& rule)
      : inputs_(inputs), tensors_(tensors), out_(out), rule_(rule) {
    check_weights(rule, weights);
    weights_.assign(weights.begin(), weights.end());
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      check(tensors[t]);
      for (std::uint64_t at = 0; at < tensors[t].nbytes; at += kFileBlock) {
        blocks_.push_back({t, at, std::min(kFileBlock, tensors[t].nbytes - at)});
      }
    }
  }

  std::unique_ptr<Combiner> make_combiner() const { return rule_.make(weights_); }

  void work(Combiner& combiner) {
    std::exception_ptr thrown;
    try {
      reduce_blocks(combiner);
    } catch (...) {  // a rule in Python may throw, and the disk may fail
      thrown = std::current_exception();
      stop();
    }
    const std::lock_guard lock(mutex_);
    if (thrown && !thrown_) {
      thrown_ = thrown;
    }
    ++finished_;
    changed_.notify_all();
  }

  void stop() { stop_.store(true); }

  // Waits up to 50 ms; true once all `threads` workers are through.
  bool wait(unsigned threads) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::milliseconds(50), [&] { return finished_ == threads; });
    return finished_ == threads;
  }

  // What a rule threw in a worker, thrown here; call it once all workers are through.
  void rethrow() const {
    if (thrown_) {
      std::rethrow_exception(thrown_);
    }
  }

  std::uint64_t done() const { return done_.load(); }
  const std::optional<FileBadValue>& bad() const { return bad_; }

 private:
  void reduce_blocks(Combiner& combiner) {
    std::vector<const void*> pointers(inputs_.size());
    std::vector<std::uint8_t> made(kFileBlock);
    for (;;) {
      const std::size_t next = next_.fetch_add(1);
      if (next >= blocks_.size() || stop_.load()) {
        break;
      }
      reduce(blocks_[next], combiner, pointers, made.data());
      done_.fetch_add(blocks_[next].nbytes);
    }
  }

  void check(const FileTensor& tensor) const {
    if (tensor.input_offsets.size() != inputs_.size()) {
      throw Error(Errc::kLayout, "a tensor has another number of inputs than there are files");
    }
    for (std::size_t k = 0; k < inputs_.size(); ++k) {
      inputs_[k]->check_range(tensor.input_offsets[k], tensor.nbytes);
    }
    out_.check_range(tensor.out_offset, tensor.nbytes);
  }

  // A block of a file is made in memory and written by one call: through the mapping, each page is a fault.
  // The device gets it while the next ones are made, so that little is left for the end.
  void reduce(const Block& block, Combiner& combiner, std::vector<const void*>& pointers,
              std::uint8_t* made) {
    const FileTensor& tensor = tensors_[block.tensor];
    const std::uint64_t place = tensor.out_offset + block.offset;
    const bool in_memory = out_.path().empty();
    std::uint8_t* const out = in_memory ? out_.data() + place : made;
    for (std::size_t k = 0; k < inputs_.size(); ++k) {
      inputs_[k]->populate(tensor.input_offsets[k] + block.offset, block.nbytes);
      pointers[k] = inputs_[k]->data() + tensor.input_offsets[k] + block.offset;
    }
    int verdict = FC_MEAN_DECLINED;
    if (is_float(tensor.dtype)) {
      verdict = combiner.combine_on_device(tensor.dtype, pointers.data(), nullptr, nullptr, out,
                                           block.nbytes / item_size(tensor.dtype));
    }
    if (verdict == FC_MEAN_NON_FINITE ||
        (verdict == FC_MEAN_DECLINED && !combine(block, combiner, pointers, out))) {
      record(block, tensor, pointers);
    }
    for (std::size_t k = 0; k < inputs_.size(); ++k) {
      inputs_[k]->release(tensor.input_offsets[k] + block.offset, block.nbytes);
    }
    if (!in_memory) {
      out_.write(place, out, block.nbytes);
      out_.write_behind(place, block.nbytes);
    }
  }

  bool combine(const Block& block, Combiner& combiner, const std::vector<const void*>& pointers,
               std::uint8_t* out) const {
    const Dtype dtype = tensors_[block.tensor].dtype;
    try {
      return combiner.combine(dtype, pointers.data(), nullptr, out, block.nbytes);
    } catch (const RuleError& error) {
      throw FileRuleError(error, block.tensor, block.offset / item_size(dtype) + error.element());
    }
  }

  void record(const Block& block, const FileTensor& tensor,
              const std::vector<const void*>& pointers) {
    const std::size_t size = item_size(tensor.dtype);
    for (std::size_t k = 0; k < pointers.size(); ++k) {
      const std::int64_t found = kernels::find_non_finite(tensor.dtype, pointers[k], block.nbytes);
      if (found < 0) {
        continue;
      }
      const FileBadValue value{k, block.tensor,
                               block.offset / size + static_cast<std::uint64_t>(found)};
      const auto key = [](const FileBadValue& v) {
        return std::make_tuple(v.tensor, v.element, v.source);
      };
      const std::lock_guard lock(mutex_);
      if (!bad_ || key(value) < key(*bad_)) {
        bad_ = value;
      }
    }
  }

  const std::vector<std::shared_ptr<MappedFile>>& inputs_;
  const std::vector<FileTensor>& tensors_;
  MappedFile& out_;
  const Rule& rule_;
  std::vector<double> weights_;
  std::vector<Block> blocks_;
  std::atomic<std::size_t> next_{0};
  std::atomic<std::uint64_t> done_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned finished_ = 0;
  std::exception_ptr thrown_;
  std::optional<FileBadValue> bad_;
};

// Joins the workers whatever happens, so that none outlives the buffers it writes to.
class FileWorkers {
 public:
  FileWorkers(FileJob& job, unsigned count) : job_(job) {
    for (unsigned i = 0; i < count; ++i) {
      combiners_.push_back(job.make_combiner());
    }
    for (const auto& combiner : combiners_) {
      threads_.emplace_back([&job, &combiner] { job.work(*combiner); });
    }
  }
  ~FileWorkers() {
    job_.stop();
    for (std::thread& thread : threads_) {
      thread.join();
    }
  }

 private:
  FileJob& job_;
  std::vector<std::unique_ptr<Combiner>> combiners_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::optional<FileBadValue> reduce_files(const std::vector<std::shared_ptr<MappedFile>>& inputs,
                                         const std::vector<std::uint64_t>& weights,
                                         const std::vector<FileTensor>& tensors,
                                         const std::shared_ptr<MappedFile>& out, const Rule& rule,
                                         unsigned threads,
                                         const std::function<void(std::uint64_t)>& progress) {
  if (weights.size() != inputs.size()) {
    throw Error(Errc::kWeight, "there must be one weight per input");
  }
  if (!out->writable()) {
    throw Error(Errc::kStorage, "the output " + out->path() + " is not writable");
  }
  kernels::active();  // a bad FEDCORE_SIMD is to be thrown here and not in a worker
  FileJob job(inputs, weights, tensors, *out, rule);
  const unsigned count = std::max(1u, threads);
  {
    const FileWorkers workers(job, count);
    while (!job.wait(count)) {
      if (progress) {
        progress(job.done());
      }
    }
  }
  job.rethrow();
  if (progress) {
    progress(job.done());
  }
  return job.bad();
}

}  // namespace fedcore
