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
#include "codec/fit_stages.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {
namespace {

// What the workers of one call share.
class UpdateJob {
 public:
  // `checked`: indices of the stages that are given what the receiver decodes.
  UpdateJob(const Codec& codec, const std::vector<std::size_t>& checked, const UpdateFiles& files,
            const std::function<void()>& progress)
      : codec_(codec),
        layout_(codec.layout()),
        checked_(checked),
        files_(files),
        progress_(progress),
        caller_(std::this_thread::get_id()),
        lost_checksums_(files.lost.file ? layout_.chunk_count() : 0),
        sums_(checked.size(), std::vector<StageSums>(layout_.chunk_count())) {
    encoded_.offsets.reserve(layout_.chunk_count() + 1);
    encoded_.offsets.push_back(0);
    encoded_.encodings.resize(layout_.chunk_count());
    encoded_.checksums.resize(layout_.chunk_count());
  }

  // Encodes chunks until none is left, or one has failed.
  void work() {
    Codec codec = codec_;
    Codec plain = codec_.with_stages({});
    std::vector<std::uint8_t> body, decoded;
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
        if (!checked_.empty()) {
          sum_decoded(codec, plain, index, body, decoded);
        }
        release(index);
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

  // What each of the checked stages sums of what the receiver decodes.
  std::vector<StageSums> decoded_sums() const {
    std::vector<StageSums> sums;
    for (const std::vector<StageSums>& of_chunks : sums_) {
      sums.push_back(add_up(of_chunks));
    }
    return sums;
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
  }

  // Decodes a body as the receiver does, and sums the differences that it gets.
  void sum_decoded(Codec& codec, Codec& plain, std::uint64_t index,
                   const std::vector<std::uint8_t>& body, std::vector<std::uint8_t>& decoded) {
    const Range range = layout_.chunk_range(index);
    const std::uint8_t* const base = at(files_.base, range);
    decoded.resize(range.nbytes);
    if (const char* why = codec.decode(index, encoded_.encodings[index], body.data(), body.size(),
                                       base, decoded.data())) {
      throw Error(Errc::kProtocol, undecodable(index, why));
    }
    plain.differences(
        index, decoded.data(), base, nullptr, [&](const Run& part, const float* differences) {
          for (std::size_t i = 0; i < checked_.size(); ++i) {
            codec_.options().stages[checked_[i]]->sum(part, differences, sums_[i][index]);
          }
        });
  }

  void release(std::uint64_t index) {
    const Range range = layout_.chunk_range(index);
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
  const std::vector<std::size_t>& checked_;
  const UpdateFiles& files_;
  const std::function<void()>& progress_;
  const std::thread::id caller_;
  std::vector<std::uint32_t> lost_checksums_;
  std::vector<std::vector<StageSums>> sums_;  // of each checked stage, of each chunk
  EncodedUpdate encoded_;                     // each chunk's thread fills its entries
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
  for (const FlatBytes* flat : {&files.values, &files.base, &files.residual, &files.lost}) {
    if (flat->file) {
      flat->file->check_range(flat->offset, codec.layout().total_bytes());
    }
  }
  const auto wanted = static_cast<unsigned>(
      std::max<std::uint64_t>(1, std::min<std::uint64_t>(threads, codec.layout().chunk_count())));
  std::vector<double> found;
  std::optional<Codec> fitted = fit_stages(codec, files, wanted, progress, found);
  const std::vector<std::size_t> checked = checked_stages(*fitted);
  for (;;) {
    UpdateJob job(*fitted, checked, files, progress);
    Workers workers(wanted);
    workers.run(wanted, [&job](unsigned) { job.work(); });
    EncodedUpdate update = job.result();
    const std::vector<StageSums> sums = job.decoded_sums();
    std::optional<Codec> tighter = tighten_stages(*fitted, checked, sums);
    if (!tighter) {
      update.found = found;
      update.decoded.assign(found.size(), 0);
      for (std::size_t i = 0; i < checked.size(); ++i) {
        update.decoded[checked[i]] = fitted->options().stages[checked[i]]->figure(sums[i]);
      }
      return update;
    }
    fitted.emplace(*std::move(tighter));
  }
}

}  // namespace fedcore
