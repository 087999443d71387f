#include "reduce/reducer.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <tuple>

#include "base/error.hpp"
#include "codec/element.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {
namespace {

constexpr std::uint64_t kFileBlock = 1u << 20;

}  // namespace

Reducer::Reducer(const std::vector<std::uint64_t>& weights)
    : bodies_(weights.size()), pointers_(weights.size()), encodings_(weights.size()) {
  if (weights.empty()) {
    throw Error(Errc::kWeight, "a mean needs at least one input");
  }
  for (const std::uint64_t weight : weights) {
    if (!kernels::is_weight(weight)) {
      throw Error(Errc::kWeight,
                  "weight " + std::to_string(weight) + ": expected " + kernels::kWeightRule);
    }
    weights_.push_back(static_cast<double>(weight));
    total_ += static_cast<double>(weight);
  }
}

std::optional<BadValue> Reducer::reduce(const Layout& layout, Range range, const Body* inputs,
                                        const std::uint8_t* base, std::uint8_t* out) {
  for (std::size_t k = 0; k < weights_.size(); ++k) {
    bodies_[k] = inputs[k].data;
  }
  for (const Run& run : layout.runs(range)) {
    const std::uint64_t at = run.offset - range.offset;
    const std::uint8_t* const run_base = base != nullptr ? base + at : nullptr;
    bool encoded = false;
    for (std::size_t k = 0; k < weights_.size(); ++k) {
      const bool here = encodes(inputs[k].scheme, run.dtype);
      pointers_[k] = bodies_[k];
      encodings_[k] = static_cast<std::uint8_t>(here ? inputs[k].scheme : Scheme::kRaw);
      encoded = encoded || here;
    }
    std::optional<BadValue> bad;
    if (encoded) {
      const int verdict = kernels::mean_on_device(
          {static_cast<int>(run.dtype), weights_.size(), pointers_.data(), encodings_.data(),
           weights_.data(), total_, run_base, out + at, run.nbytes / item_size(run.dtype)});
      if (verdict != FC_MEAN_FINITE) {  // the CPU finds what is not finite
        bad = reduce_pieces(run, inputs, run_base, out + at);
      }
    } else if (!kernels::mean(run.dtype, pointers_.data(), weights_.data(), weights_.size(), total_,
                              run_base, out + at, run.nbytes)) {
      bad = find_bad(run.dtype, run.offset, run.nbytes);
    }
    if (bad) {
      return bad;
    }
    for (std::size_t k = 0; k < weights_.size(); ++k) {
      bodies_[k] += run_bytes(inputs[k].scheme, run, bodies_[k]);
    }
  }
  return std::nullopt;
}

// A run that is encoded in one input at least: a piece of each is decoded, and their mean taken,
// while they are in the cache.
std::optional<BadValue> Reducer::reduce_pieces(const Run& run, const Body* inputs,
                                               const std::uint8_t* base, std::uint8_t* out) {
  const std::size_t width = item_size(run.dtype), count = run.nbytes / width;
  const std::size_t piece_bytes = kernels::kPiece * width;
  readers_.clear();
  for (std::size_t k = 0; k < weights_.size(); ++k) {
    if (encodes(inputs[k].scheme, run.dtype)) {
      readers_.emplace_back(inputs[k].scheme, run.dtype, bodies_[k], count);
    }
  }
  pieces_.resize(std::max(pieces_.size(), readers_.size() * piece_bytes));
  for (std::size_t first = 0; first < count; first += kernels::kPiece) {
    const std::size_t at = first * width, n = std::min(kernels::kPiece, count - first);
    std::size_t reader = 0;
    for (std::size_t k = 0; k < weights_.size(); ++k) {
      pointers_[k] = bodies_[k] + at;
      if (encodes(inputs[k].scheme, run.dtype)) {
        std::uint8_t* const piece = pieces_.data() + reader * piece_bytes;
        readers_[reader++].next(base != nullptr ? base + at : nullptr, piece, n);
        pointers_[k] = piece;
      }
    }
    if (!kernels::mean_here(run.dtype, pointers_.data(), weights_.data(), weights_.size(), total_,
                            nullptr, out + at, n * width)) {
      return find_bad(run.dtype, run.offset + at, n * width);
    }
  }
  return std::nullopt;
}

// The first value that is not finite in the block that pointers_ show.
std::optional<BadValue> Reducer::find_bad(Dtype dtype, std::uint64_t offset,
                                          std::uint64_t nbytes) const {
  for (std::size_t k = 0; k < weights_.size(); ++k) {
    const std::int64_t found = kernels::find_non_finite(dtype, pointers_[k], nbytes);
    if (found >= 0) {
      return BadValue{k, offset + static_cast<std::uint64_t>(found) * item_size(dtype)};
    }
  }
  return std::nullopt;
}

std::optional<BadValue> Reducer::fold(const Layout& layout, Range range, std::size_t source,
                                      const Body& input, const std::uint8_t* base,
                                      std::uint8_t* out) {
  const std::vector<Run> runs = layout.runs(range);
  std::size_t sums = 0;
  const std::uint8_t* body = input.data;
  for (const Run& run : runs) {
    if (!encodes(input.scheme, run.dtype)) {  // what is encoded is finite
      const std::int64_t found = kernels::find_non_finite(run.dtype, body, run.nbytes);
      if (found >= 0) {
        return BadValue{source,
                        run.offset + static_cast<std::uint64_t>(found) * item_size(run.dtype)};
      }
    }
    body += run_bytes(input.scheme, run, body);
    sums += kernels::sums_per_element(run.dtype) * run.nbytes / item_size(run.dtype);
  }
  sums_.resize(std::max(sums, sums_.size()));
  double* at = sums_.data();
  body = input.data;
  for (const Run& run : runs) {
    const std::uint64_t begin = run.offset - range.offset;
    if (encodes(input.scheme, run.dtype)) {
      fold_pieces(run, source, input.scheme, body, base != nullptr ? base + begin : nullptr, at);
    } else if (is_float(run.dtype)) {
      kernels::fold(run.dtype, body, weights_[source], source == 0, at, run.nbytes);
    } else if (source == 0) {
      std::memcpy(out + begin, base != nullptr ? base + begin : body, run.nbytes);
    }
    at += kernels::sums_per_element(run.dtype) * run.nbytes / item_size(run.dtype);
    body += run_bytes(input.scheme, run, body);
  }
  return std::nullopt;
}

void Reducer::fold_pieces(const Run& run, std::size_t source, Scheme scheme,
                          const std::uint8_t* body, const std::uint8_t* base, double* sums) {
  const std::size_t width = item_size(run.dtype), count = run.nbytes / width;
  RunReader reader(scheme, run.dtype, body, count);
  pieces_.resize(std::max(pieces_.size(), kernels::kPiece * width));
  for (std::size_t first = 0; first < count; first += kernels::kPiece) {
    const std::size_t n = std::min(kernels::kPiece, count - first);
    reader.next(base != nullptr ? base + first * width : nullptr, pieces_.data(), n);
    kernels::fold(run.dtype, pieces_.data(), weights_[source], source == 0,
                  sums + kernels::sums_per_element(run.dtype) * first, n * width);
  }
}

void Reducer::finish(const Layout& layout, Range range, std::uint8_t* out) {
  const double* at = sums_.data();
  for (const Run& run : layout.runs(range)) {
    kernels::finish(run.dtype, at, total_, out + (run.offset - range.offset), run.nbytes);
    at += kernels::sums_per_element(run.dtype) * run.nbytes / item_size(run.dtype);
  }
}

namespace {

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
          MappedFile& out)
      : inputs_(inputs), tensors_(tensors), out_(out) {
    Reducer checked(weights);
    for (const std::uint64_t weight : weights) {
      weights_.push_back(static_cast<double>(weight));
      total_ += static_cast<double>(weight);
    }
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      check(tensors[t]);
      for (std::uint64_t at = 0; at < tensors[t].nbytes; at += kFileBlock) {
        blocks_.push_back({t, at, std::min(kFileBlock, tensors[t].nbytes - at)});
      }
    }
  }

  void work() {
    std::vector<const void*> pointers(inputs_.size());
    for (;;) {
      const std::size_t next = next_.fetch_add(1);
      if (next >= blocks_.size() || stop_.load()) {
        break;
      }
      reduce(blocks_[next], pointers);
      done_.fetch_add(blocks_[next].nbytes);
    }
    const std::lock_guard lock(mutex_);
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

  std::uint64_t done() const { return done_.load(); }
  const std::optional<FileBadValue>& bad() const { return bad_; }

 private:
  void check(const FileTensor& tensor) const {
    if (tensor.input_offsets.size() != inputs_.size()) {
      throw Error(Errc::kLayout, "a tensor has another number of inputs than there are files");
    }
    for (std::size_t k = 0; k < inputs_.size(); ++k) {
      inputs_[k]->check_range(tensor.input_offsets[k], tensor.nbytes);
    }
    out_.check_range(tensor.out_offset, tensor.nbytes);
  }

  void reduce(const Block& block, std::vector<const void*>& pointers) {
    const FileTensor& tensor = tensors_[block.tensor];
    for (std::size_t k = 0; k < inputs_.size(); ++k) {
      pointers[k] = inputs_[k]->data() + tensor.input_offsets[k] + block.offset;
    }
    if (!kernels::mean(tensor.dtype, pointers.data(), weights_.data(), weights_.size(), total_,
                       nullptr, out_.data() + tensor.out_offset + block.offset, block.nbytes)) {
      record(block, tensor, pointers);
    }
    for (std::size_t k = 0; k < inputs_.size(); ++k) {
      inputs_[k]->release(tensor.input_offsets[k] + block.offset, block.nbytes);
    }
    out_.release(tensor.out_offset + block.offset, block.nbytes);
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
  std::vector<double> weights_;
  double total_ = 0;
  std::vector<Block> blocks_;
  std::atomic<std::size_t> next_{0};
  std::atomic<std::uint64_t> done_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned finished_ = 0;
  std::optional<FileBadValue> bad_;
};

// Joins the workers whatever happens, so that none outlives the buffers it writes to.
class Workers {
 public:
  Workers(FileJob& job, unsigned count) : job_(job) {
    for (unsigned i = 0; i < count; ++i) {
      threads_.emplace_back([&job] { job.work(); });
    }
  }
  ~Workers() {
    job_.stop();
    for (std::thread& thread : threads_) {
      thread.join();
    }
  }

 private:
  FileJob& job_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::optional<FileBadValue> reduce_files(const std::vector<std::shared_ptr<MappedFile>>& inputs,
                                         const std::vector<std::uint64_t>& weights,
                                         const std::vector<FileTensor>& tensors,
                                         const std::shared_ptr<MappedFile>& out, unsigned threads,
                                         const std::function<void(std::uint64_t)>& progress) {
  if (weights.size() != inputs.size()) {
    throw Error(Errc::kWeight, "there must be one weight per input");
  }
  if (!out->writable()) {
    throw Error(Errc::kStorage, "the output " + out->path() + " is not writable");
  }
  kernels::active();  // a bad FEDCORE_SIMD is to be thrown here and not in a worker
  FileJob job(inputs, weights, tensors, *out);
  const unsigned count = std::max(1u, threads);
  {
    const Workers workers(job, count);
    while (!job.wait(count)) {
      if (progress) {
        progress(job.done());
      }
    }
  }
  if (progress) {
    progress(job.done());
  }
  return job.bad();
}

}  // namespace fedcore
