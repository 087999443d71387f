#include "codec/update_encoder.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "base/workers.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {
namespace {

// What the workers of one call share.
class UpdateJob {
 public:
  UpdateJob(const Codec& codec, const UpdateFiles& files, const std::function<void()>& progress)
      : codec_(codec),
        layout_(codec.layout()),
        files_(files),
        progress_(progress),
        caller_(std::this_thread::get_id()),
        lost_checksums_(files.lost.file ? layout_.chunk_count() : 0) {
    for (const FlatBytes* flat : {&files.values, &files.base, &files.residual, &files.lost}) {
      if (flat->file) {
        flat->file->check_range(flat->offset, layout_.total_bytes());
      }
    }
    encoded_.offsets.reserve(layout_.chunk_count() + 1);
    encoded_.offsets.push_back(0);
    encoded_.encodings.resize(layout_.chunk_count());
    encoded_.checksums.resize(layout_.chunk_count());
  }

  // Encodes chunks until none is left, or one has failed.
  void work() {
    Codec codec = codec_;
    std::vector<std::uint8_t> body;
    for (;;) {
      if (stop_) {  // asked before: a chunk that was taken is waited for
        return;
      }
      const std::uint64_t index = next_.fetch_add(1);
      if (index >= layout_.chunk_count()) {
        return;
      }
      try {
        encode(codec, index, body);
        place(index, body);
        if (progress_ && std::this_thread::get_id() == caller_) {
          progress_();
        }
      } catch (...) {
        fail(index);
        return;
      }
    }
  }

  EncodedUpdate result() {
    if (error_) {
      std::rethrow_exception(error_);
    }
    for (const FlatBytes* flat : {&files_.values, &files_.base, &files_.residual, &files_.lost}) {
      if (flat->file) {
        flat->file->check_whole();
      }
    }
    for (std::uint64_t i = 0; i < lost_checksums_.size(); ++i) {
      encoded_.lost_checksum =
          crc32c_combine(encoded_.lost_checksum, lost_checksums_[i], layout_.chunk_range(i).nbytes);
    }
    return std::move(encoded_);
  }

 private:
  static std::uint8_t* at(const FlatBytes& flat, const Range& range) {
    return flat.file ? flat.file->data() + flat.offset + range.offset : nullptr;
  }

  void encode(Codec& codec, std::uint64_t index, std::vector<std::uint8_t>& body) {
    const Range range = layout_.chunk_range(index);
    Lost lost{at(files_.lost, range)};
    encoded_.encodings[index] =
        codec.encode(index, at(files_.values, range), at(files_.base, range),
                     at(files_.residual, range), body, lost.to != nullptr ? &lost : nullptr);
    if (lost.to != nullptr) {
      lost_checksums_[index] = lost.checksum;
    }
    encoded_.checksums[index] = crc32c(body.data(), body.size());
    for (const FlatBytes* flat : {&files_.values, &files_.base, &files_.residual, &files_.lost}) {
      if (flat->file) {
        flat->file->release(flat->offset + range.offset, range.nbytes);
      }
    }
  }

  // Waits for the chunks before, which fix where this one goes, and writes it there.
  void place(std::uint64_t index, const std::vector<std::uint8_t>& body) {
    std::uint64_t offset = 0;
    {
      std::unique_lock lock(mutex_);
      turn_.wait(lock, [&] { return placed_ == index || error_; });
      if (error_) {
        return;
      }
      offset = encoded_.offsets.back();
      encoded_.offsets.push_back(offset + body.size());
      ++placed_;
    }
    turn_.notify_all();
    files_.out->write(offset, body.data(), body.size());
  }

  // Called where an exception is handled. Of several chunks that fail, the first one's error stays.
  void fail(std::uint64_t index) {
    stop_ = true;
    {
      std::unique_lock lock(mutex_);
      turn_.wait(lock, [&] { return placed_ >= index || error_; });
      if (!error_) {
        error_ = std::current_exception();
      }
    }
    turn_.notify_all();
  }

  const Codec& codec_;
  const Layout& layout_;
  const UpdateFiles& files_;
  const std::function<void()>& progress_;
  const std::thread::id caller_;
  std::vector<std::uint32_t> lost_checksums_;
  EncodedUpdate encoded_;  // each chunk's thread fills its entries
  std::atomic<std::uint64_t> next_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable turn_;
  // Under the lock, as encoded_.offsets:
  std::uint64_t placed_ = 0;  // chunks that have their place
  std::exception_ptr error_;
};

}  // namespace

EncodedUpdate encode_update(const Codec& codec, const UpdateFiles& files, unsigned threads,
                            const std::function<void()>& progress) {
  kernels::active();  // a bad FEDCORE_SIMD is to be thrown here and not in a worker
  UpdateJob job(codec, files, progress);
  const auto wanted =
      static_cast<unsigned>(std::min<std::uint64_t>(threads, codec.layout().chunk_count()));
  Workers workers(std::max(1u, wanted));
  workers.run(std::max(1u, wanted), [&job](unsigned) { job.work(); });
  return job.result();
}

}  // namespace fedcore
