#include "reduce/pairs.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <tuple>

#include "base/error.hpp"
#include "base/workers.hpp"
#include "kernels/arith.hpp"
#include "kernels/kernels.hpp"
#include "reduce/pair_loops.hpp"

namespace fedcore {
namespace {

constexpr std::size_t kStep = 256;  // elements of a source in a piece
constexpr std::size_t kLanes = PairLoops::kLanes;
constexpr std::uint64_t kBlock = 1u << 20;
constexpr std::size_t kSegments = 64;

struct Block {
  std::size_t tensor;
  std::uint64_t offset;
  std::uint64_t nbytes;
};

class PairJob {
 public:
  PairJob(const std::vector<std::shared_ptr<MappedFile>>& inputs,
          const std::vector<FileTensor>& tensors)
      : inputs_(inputs), tensors_(tensors), k_(inputs.size()) {
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      check(tensors[t]);
      if (is_float(tensors[t].dtype)) {
        for (std::uint64_t at = 0; at < tensors[t].nbytes; at += kBlock) {
          blocks_.push_back({t, at, std::min(kBlock, tensors[t].nbytes - at)});
        }
      }
    }
    segments_ = std::min(kSegments, blocks_.size());
    sums_.resize(segments_ * pairs());
  }

  std::size_t segments() const { return segments_; }

  // The sums of one segment: blocks after another. Segments may be done at the same time.
  void work(std::size_t segment) {
    std::vector<double> values(k_ * kStep);
    std::vector<double> lanes(pairs() * kLanes);
    double* const sums = sums_.data() + segment * pairs();
    const std::size_t end = first_block(segment + 1);
    for (std::size_t b = first_block(segment); b < end; ++b) {
      std::fill(lanes.begin(), lanes.end(), 0.0);
      add(blocks_[b], values, lanes.data());
      for (std::size_t p = 0; p < pairs(); ++p) {
        sums[p] += sum_of_lanes(lanes.data() + p * kLanes);
      }
    }
  }

  std::uint64_t bytes_of(std::size_t segment) const {
    std::uint64_t bytes = 0;
    for (std::size_t b = first_block(segment); b < first_block(segment + 1); ++b) {
      bytes += blocks_[b].nbytes;
    }
    return bytes;
  }

  Distances result() const {
    Distances found{std::vector<double>(pairs()), bad_};
    for (std::size_t segment = 0; segment < segments_; ++segment) {
      for (std::size_t p = 0; p < pairs(); ++p) {
        found.squares[p] += sums_[segment * pairs() + p];
      }
    }
    return found;
  }

 private:
  std::size_t pairs() const { return pairs_of(k_); }
  std::size_t first_block(std::size_t segment) const {
    return segment * blocks_.size() / segments_;
  }

  void check(const FileTensor& tensor) const {
    if (tensor.input_offsets.size() != k_) {
      throw Error(Errc::kLayout, "a tensor has another number of inputs than there are files");
    }
    for (std::size_t k = 0; k < k_; ++k) {
      inputs_[k]->check_range(tensor.input_offsets[k], tensor.nbytes);
    }
  }

  void add(const Block& block, std::vector<double>& values, double* lanes) {
    const FileTensor& tensor = tensors_[block.tensor];
    const std::size_t width = item_size(tensor.dtype);
    const std::size_t count = static_cast<std::size_t>(block.nbytes) / width;
    const PairLoops& loops = pair_loops();
    const auto widen = loops.widen[float_place(tensor.dtype)];
    for (std::size_t at = 0; at < count; at += kStep) {
      const std::size_t n = std::min(kStep, count - at);
      const std::size_t padded = (n + kLanes - 1) / kLanes * kLanes;
      for (std::size_t k = 0; k < k_; ++k) {
        const std::uint64_t offset = tensor.input_offsets[k] + block.offset + at * width;
        double* const row = values.data() + k * kStep;
        if (widen(inputs_[k]->data() + offset, row, n) != 0) {
          record(block, at, k, row, n);
        }
        std::fill(row + n, row + padded, 0.0);
      }
      loops.add_pairs(values.data(), k_, kStep, padded, lanes);
    }
    for (std::size_t k = 0; k < k_; ++k) {
      inputs_[k]->release(tensor.input_offsets[k] + block.offset, block.nbytes);
    }
  }

  void record(const Block& block, std::size_t at, std::size_t source, const double* row,
              std::size_t n) {
    const double* const found =
        std::find_if(row, row + n, [](double value) { return arith::non_finite(value) != 0; });
    const std::uint64_t element = block.offset / item_size(tensors_[block.tensor].dtype) + at +
                                  static_cast<std::uint64_t>(found - row);
    const auto key = [](const FileBadValue& v) {
      return std::make_tuple(v.tensor, v.element, v.source);
    };
    const FileBadValue value{source, block.tensor, element};
    const std::lock_guard lock(mutex_);
    if (!bad_ || key(value) < key(*bad_)) {
      bad_ = value;
    }
  }

  const std::vector<std::shared_ptr<MappedFile>>& inputs_;
  const std::vector<FileTensor>& tensors_;
  std::size_t k_;
  std::vector<Block> blocks_;
  std::size_t segments_ = 0;
  std::vector<double> sums_;  // a sum for each pair, segment after segment
  std::mutex mutex_;
  std::optional<FileBadValue> bad_;
};

}  // namespace

Distances pair_distances(const std::vector<std::shared_ptr<MappedFile>>& inputs,
                         const std::vector<FileTensor>& tensors, unsigned threads,
                         const std::function<void(std::uint64_t)>& progress) {
  kernels::active();  // a bad FEDCORE_SIMD is to be thrown here and not in a worker
  PairJob job(inputs, tensors);
  threads = std::max(1u, threads);
  Workers workers(threads);
  std::uint64_t done = 0;
  for (std::size_t first = 0; first < job.segments(); first += threads) {
    const std::size_t count = std::min<std::size_t>(threads, job.segments() - first);
    workers.run(static_cast<unsigned>(count), [&](unsigned i) { job.work(first + i); });
    for (std::size_t i = 0; i < count; ++i) {
      done += job.bytes_of(first + i);
    }
    if (progress) {
      progress(done);
    }
  }
  return job.result();
}

}  // namespace fedcore
