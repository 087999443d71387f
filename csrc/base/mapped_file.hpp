// MappedFile: one memory-mapped file, or anonymous memory of the same interface.
//
// Bulk output goes through write(), not through the mapping: a store to a page of a new file makes
// the kernel read and clear that page first, which costs several times the copy itself. The mapping
// is for reading, and for small stores. Both see the same bytes.
//
// Owns the descriptor and the mapping; both go with the object, which is shared by shared_ptr among
// whoever still reads or writes it. Space is reserved when the file is created, so a full disk is
// an error then and never a SIGBUS later. A file that becomes shorter while it is mapped reads as
// zeros from there on, and check_whole() says so. Methods are usable from any thread; the bytes are
// the users' to synchronise. A sparse file is only made long: a part of it takes room on the device
// once it is written, and write() is what meets a full disk. What was never written is not read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/mapping_guard.hpp"

namespace fedcore {

class MappedFile {
 public:
  // All throw Error{kStorage}, naming the file and the cause. create() refuses to replace a file.
  static std::shared_ptr<MappedFile> create(const std::string& path, std::uint64_t size);
  static std::shared_ptr<MappedFile> create_sparse(const std::string& path, std::uint64_t size);
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

  // Throws Error{kStorage} unless [offset, offset + length) lies inside. Arms the guard.
  void check_range(std::uint64_t offset, std::uint64_t length) const;

  // Throws Error{kStorage} if bytes that were read were gone: the file has become shorter, or its
  // disk could not read them.
  void check_whole() const;
  bool whole() const noexcept { return !guard_.broken(); }

  // Drops the pages that the range touches from this process's memory; the bytes stay in the file
  // (a no-op for anonymous memory, whose bytes would be lost). What lies beside the range on its
  // first and last page comes back when it is read.
  void release(std::uint64_t offset, std::uint64_t length) noexcept;

  // Reserves more space and maps it, perhaps elsewhere: only for a file that nobody else uses at
  // the moment. Throws Error{kStorage}, and then nothing has changed.
  void grow(std::uint64_t size);
  void grow_sparse(std::uint64_t size);

  // Copies bytes into the file. No page becomes resident in this process. Throws Error{kStorage}.
  void write(std::uint64_t offset, const void* data, std::uint64_t length);

  // Arms the guard, for reads that nothing else precedes: see MappingGuard::arm().
  static void arm() noexcept { MappingGuard::arm(); }

  // Makes a range resident in one step, where reading it would fault page by page. Arms the guard.
  void populate(std::uint64_t offset, std::uint64_t length) noexcept;

  // Starts writing a range back to the device, without waiting for it.
  void write_behind(std::uint64_t offset, std::uint64_t length) noexcept;

  // Lets the system forget its cached copy of the file, once nobody is going to read it soon.
  void evict() noexcept;

  // Writes everything back to the device: msync, then fsync. Throws as check_whole() does.
  void sync();

 private:
  // How the space of a file is had.
  using Reserve = int (*)(int fd, std::uint64_t size, std::uint64_t from) noexcept;
  MappedFile(std::string path, int fd, std::uint64_t size, bool writable);
  static std::shared_ptr<MappedFile> create(const std::string& path, std::uint64_t size,
                                            Reserve reserve);
  void grow(std::uint64_t size, Reserve reserve);

  std::string path_;
  int fd_;
  std::uint8_t* data_ = nullptr;
  std::uint64_t size_;
  bool writable_;
  MappingGuard guard_;
};

}  // namespace fedcore
