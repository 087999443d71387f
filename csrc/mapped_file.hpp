// MappedFile: one memory-mapped file, or anonymous memory of the same interface.
//
// Owns the descriptor and the mapping; both go with the object, which is shared by shared_ptr among
// whoever still reads or writes it. Space is reserved when the file is created, so a full disk is
// an error then and never a SIGBUS later. Methods are usable from any thread; the bytes are the
// users' to synchronise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace fedcore {

class MappedFile {
 public:
  // All throw Error{kStorage}, naming the file and the cause. create() refuses to replace a file.
  static std::shared_ptr<MappedFile> create(const std::string& path, std::uint64_t size);
  static std::shared_ptr<MappedFile> open(const std::string& path, bool writable);
  static std::shared_ptr<MappedFile> anonymous(std::uint64_t size);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::uint8_t* data() noexcept { return data_; }
  const std::uint8_t* data() const noexcept { return data_; }
  std::uint64_t size() const noexcept { return size_; }
  bool writable() const noexcept { return writable_; }
  const std::string& path() const noexcept { return path_; }

  // Throws Error{kStorage} unless [offset, offset + length) lies inside.
  void check_range(std::uint64_t offset, std::uint64_t length) const;

  // Drops the whole pages inside the range from this process's memory; the bytes stay in the file
  // (a no-op for anonymous memory, whose bytes would be lost).
  void release(std::uint64_t offset, std::uint64_t length) noexcept;

  // Writes everything back to the device: msync, then fsync.
  void sync();

 private:
  MappedFile(std::string path, int fd, std::uint64_t size, bool writable);

  std::string path_;
  int fd_;
  std::uint8_t* data_ = nullptr;
  std::uint64_t size_;
  bool writable_;
};

}  // namespace fedcore
