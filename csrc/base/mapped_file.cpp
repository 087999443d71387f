#include "base/mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/copy.hpp"
#include "base/error.hpp"

namespace fedcore {
namespace {

[[noreturn]] void fail(const std::string& what, const std::string& path, int code) {
  throw Error(Errc::kStorage, what + " " + path + ": " + std::strerror(code));
}

// Sets the size alone.
int reserve_none(int fd, std::uint64_t size, std::uint64_t) noexcept {
  return ftruncate(fd, static_cast<off_t>(size)) == 0 ? 0 : errno;
}

// Reserves the space on the device. Where the platform can't, the size is only set.
int reserve_all(int fd, std::uint64_t size, std::uint64_t from) noexcept {
#if defined(__linux__) || defined(__FreeBSD__)
  return posix_fallocate(fd, static_cast<off_t>(from), static_cast<off_t>(size - from));
#else
  return reserve_none(fd, size, from);
#endif
}

std::uint64_t page_size() noexcept {
  static const std::uint64_t size = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

MappedFile::MappedFile(std::string path, int fd, std::uint64_t size, bool writable)
    : path_(std::move(path)), fd_(fd), size_(size), writable_(writable) {
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  void* memory = mmap(nullptr, size, protection, flags, fd, 0);
  if (memory == MAP_FAILED) {
    const int code = errno;
    if (fd >= 0) {
      ::close(fd);
    }
    fail("cannot map", path_.empty() ? std::to_string(size) + " bytes of memory" : path_, code);
  }
  data_ = static_cast<std::uint8_t*>(memory);
  if (fd >= 0) {
    guard_.watch(data_, size_);
  }
#if defined(MADV_HUGEPAGE)
  if (fd < 0) {
    madvise(data_, size, MADV_HUGEPAGE);  // where it is refused, pages are small
  }
#endif
}

MappedFile::~MappedFile() {
  guard_.forget();
  munmap(data_, size_);
  if (fd_ >= 0) {
    ::close(fd_);
  }
}

std::shared_ptr<MappedFile> MappedFile::create(const std::string& path, std::uint64_t size) {
  return create(path, size, reserve_all);
}

std::shared_ptr<MappedFile> MappedFile::create_sparse(const std::string& path, std::uint64_t size) {
  return create(path, size, reserve_none);
}

std::shared_ptr<MappedFile> MappedFile::create(const std::string& path, std::uint64_t size,
                                               Reserve reserve) {
  if (size == 0) {
    throw Error(Errc::kStorage, "cannot create " + path + ": a mapped file can't be empty");
  }
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) {
    fail("cannot create", path, errno);
  }
  const int code = reserve(fd, size, 0);
  if (code != 0) {
    ::close(fd);
    ::unlink(path.c_str());
    fail("cannot reserve " + std::to_string(size) + " bytes for", path, code);
  }
  return std::shared_ptr<MappedFile>(new MappedFile(path, fd, size, true));
}

std::shared_ptr<MappedFile> MappedFile::open(const std::string& path, bool writable) {
  const int fd = ::open(path.c_str(), (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
  if (fd < 0) {
    fail("cannot open", path, errno);
  }
  struct stat info{};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size == 0) {
    const int code = S_ISDIR(info.st_mode) ? EISDIR : EINVAL;
    ::close(fd);
    fail("cannot map (not a regular file with content)", path, code);
  }
  return std::shared_ptr<MappedFile>(
      new MappedFile(path, fd, static_cast<std::uint64_t>(info.st_size), writable));
}

std::shared_ptr<MappedFile> MappedFile::anonymous(std::uint64_t size) {
  if (size == 0) {
    throw Error(Errc::kStorage, "cannot map 0 bytes of memory");
  }
  return std::shared_ptr<MappedFile>(new MappedFile("", -1, size, true));
}

void MappedFile::check_range(std::uint64_t offset, std::uint64_t length) const {
  if (offset > size_ || length > size_ - offset) {
    throw Error(Errc::kStorage, "bytes " + std::to_string(offset) + " to " +
                                    std::to_string(offset + length) + " lie outside " +
                                    (path_.empty() ? "the memory" : path_) + " of " +
                                    std::to_string(size_) + " bytes");
  }
  arm();
}

void MappedFile::check_whole() const {
  if (!whole()) {
    throw Error(Errc::kStorage,
                path_ +
                    " became shorter while it was in use, or its disk could not read "
                    "it: put the whole file back");
  }
}

void MappedFile::release(std::uint64_t offset, std::uint64_t length) noexcept {
  if (fd_ < 0 || offset > size_ || length > size_ - offset) {
    return;
  }
  const std::uint64_t page = page_size();
  const std::uint64_t from = offset / page * page;
  const std::uint64_t to = std::min((offset + length + page - 1) / page * page, size_);
  if (from < to) {
    madvise(data_ + from, to - from, MADV_DONTNEED);
  }
}

void MappedFile::grow(std::uint64_t size) { grow(size, reserve_all); }

void MappedFile::grow_sparse(std::uint64_t size) { grow(size, reserve_none); }

void MappedFile::grow(std::uint64_t size, Reserve reserve) {
  if (fd_ < 0 || !writable_ || size <= size_) {
    throw Error(Errc::kStorage, "cannot grow " + (path_.empty() ? "memory" : path_) + " to " +
                                    std::to_string(size) + " bytes");
  }
  const int code = reserve(fd_, size, size_);
  if (code != 0) {
    // What was reserved before the failure is given back.
    static_cast<void>(ftruncate(fd_, static_cast<off_t>(size_)) == 0);
    fail("cannot reserve " + std::to_string(size - size_) + " more bytes for", path_, code);
  }
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (memory == MAP_FAILED) {
    fail("cannot map", path_, errno);
  }
  guard_.watch(memory, size);
  munmap(data_, size_);
  data_ = static_cast<std::uint8_t*>(memory);
  size_ = size;
}

void MappedFile::write(std::uint64_t offset, const void* data, std::uint64_t length) {
  check_range(offset, length);
  if (fd_ < 0) {
    stream_copy(data_ + offset, data, length);
    return;
  }
  const auto* from = static_cast<const std::uint8_t*>(data);
  while (length > 0) {
    const ssize_t done = pwrite(fd_, from, length, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) {
      continue;
    }
    if (done <= 0) {
      fail("cannot write", path_, done == 0 ? ENOSPC : errno);
    }
    from += done;
    offset += static_cast<std::uint64_t>(done);
    length -= static_cast<std::uint64_t>(done);
  }
}

void MappedFile::populate(std::uint64_t offset, std::uint64_t length) noexcept {
#if defined(__linux__)
  // Linux 5.14; where the kernel does not know it, pages come one fault at a time.
  constexpr int kPopulateRead = 22;
  if (fd_ < 0 || length == 0 || offset > size_ || length > size_ - offset) {
    return;
  }
  arm();
  const std::uint64_t from = offset / page_size() * page_size();
  madvise(data_ + from, offset + length - from, kPopulateRead);
#else
  static_cast<void>(offset);
  static_cast<void>(length);
#endif
}

void MappedFile::write_behind(std::uint64_t offset, std::uint64_t length) noexcept {
#if defined(__linux__)
  if (fd_ >= 0) {
    sync_file_range(fd_, static_cast<off64_t>(offset), static_cast<off64_t>(length),
                    SYNC_FILE_RANGE_WRITE);
  }
#else
  static_cast<void>(offset);
  static_cast<void>(length);
#endif
}

void MappedFile::evict() noexcept {
#if defined(POSIX_FADV_DONTNEED)
  if (fd_ >= 0) {
    release(0, size_);
    posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);
  }
#endif
}

void MappedFile::sync() {
  if (fd_ < 0) {
    return;
  }
  check_whole();
  if (msync(data_, size_, MS_SYNC) != 0) {
    fail("cannot write back", path_, errno);
  }
  if (fsync(fd_) != 0) {
    fail("cannot synchronise", path_, errno);
  }
}

}  // namespace fedcore
