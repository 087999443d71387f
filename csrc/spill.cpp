#include "spill.hpp"

#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.hpp"

namespace fedcore {
namespace {

std::string folder_of(const std::string& path) {
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash + 1);
}

}  // namespace

Spill::Spill(std::string path, std::uint64_t slot_bytes, std::uint64_t keep_free,
             std::uint64_t extent_bytes)
    : path_(std::move(path)),
      slot_bytes_(slot_bytes),
      keep_free_(keep_free),
      extent_bytes_(extent_bytes) {
  if (slot_bytes_ == 0) {
    throw Error(Errc::kStorage, "a spill file needs slots of at least a byte");
  }
  if (::unlink(path_.c_str()) != 0 && errno != ENOENT) {
    throw Error(Errc::kStorage, "cannot remove " + path_ + ": " + std::strerror(errno));
  }
}

Spill::~Spill() {
  if (file_) {
    ::unlink(path_.c_str());
  }
}

// The reserved extent is all there is to write to: where it could be had, put() does not meet a
// full disk.
bool Spill::grow() {
  const std::uint64_t more = std::max<std::uint64_t>(1, extent_bytes_ / slot_bytes_);
  const std::uint64_t bytes = more * slot_bytes_;
  struct statvfs room{};
  if (statvfs(folder_of(path_).c_str(), &room) == 0 &&
      static_cast<std::uint64_t>(room.f_bavail) * room.f_frsize < bytes + keep_free_) {
    problem_ =
        "less than " + std::to_string((bytes + keep_free_) >> 20) + " MiB free beside " + path_;
    return false;
  }
  try {
    if (file_) {
      file_->grow(file_->size() + bytes);
    } else {
      file_ = MappedFile::create(path_, bytes);
    }
  } catch (const Error& error) {
    problem_ = error.what();
    return false;
  }
  free_.reserve(static_cast<std::size_t>(slots_ + more));  // so that free() can't fail
  for (std::uint64_t i = more; i > 0; --i) {
    free_.push_back(slots_ + static_cast<Slot>(i - 1));
  }
  slots_ += static_cast<Slot>(more);
  return true;
}

std::optional<Spill::Slot> Spill::put(const std::uint8_t* data, std::uint64_t size) {
  const std::lock_guard lock(mutex_);
  if (size > slot_bytes_ || (free_.empty() && !grow())) {
    return std::nullopt;
  }
  const Slot slot = free_.back();
  try {
    file_->write(slot * slot_bytes_, data, size);
  } catch (const Error& error) {
    problem_ = error.what();
    return std::nullopt;
  }
  free_.pop_back();
  return slot;
}

const std::uint8_t* Spill::at(Slot slot, std::uint64_t size) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t offset = slot * slot_bytes_;
  file_->check_range(offset, size);
  file_->populate(offset, size);
  return file_->data() + offset;
}

void Spill::drop_pages(Slot slot) noexcept {
  const std::lock_guard lock(mutex_);
  file_->release(slot * slot_bytes_, slot_bytes_);
}

void Spill::free(Slot slot) noexcept {
  const std::lock_guard lock(mutex_);
  free_.push_back(slot);
}

std::string Spill::problem() const {
  const std::lock_guard lock(mutex_);
  return problem_;
}

std::uint64_t Spill::used() const {
  const std::lock_guard lock(mutex_);
  return slots_ - free_.size();
}

std::uint64_t Spill::file_bytes() const {
  const std::lock_guard lock(mutex_);
  return file_ ? file_->size() : 0;
}

}  // namespace fedcore
