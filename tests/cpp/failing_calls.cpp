// A library to preload: the n-th call that changes a file dies, is torn, or fails.
//
// Counts from fail_at() on, in the process that called it. Modes: 'd' the process ends before the
// call, 't' a write is done by half and then the process ends, 'e' the call fails (no space, or an
// I/O error), 's' a write is done by half and says so. The name of the call goes to `trace_fd`.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

namespace {

std::atomic<long> left{0};
char mode = 0;
int trace = -1;

template <typename F>
F next(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

ssize_t write_through(int fd, const void* data, size_t size) {
  static const auto real = next<ssize_t (*)(int, const void*, size_t)>("write");
  return real(fd, data, size);
}

// Whether this call is the one; does not return where the process is to end before it.
bool hit(const char* name) {
  if (left.load() <= 0 || --left != 0) {
    return false;
  }
  write_through(trace, name, std::strlen(name));
  if (mode == 'd') {
    _exit(99);
  }
  return true;
}

template <typename Write>
ssize_t half(Write write, size_t size) {
  if (mode == 'e') {
    errno = ENOSPC;
    return -1;
  }
  const ssize_t done = write(size / 2 > 0 ? size / 2 : size);
  if (mode == 't') {
    _exit(99);
  }
  return done;
}

// Of calls that are done or not: torn means that the process ends just after.
template <typename Call>
int whole(const char* name, int error, Call call) {
  if (!hit(name)) {
    return call();
  }
  if (mode == 'e') {
    errno = error;
    return -1;
  }
  const int result = call();
  if (mode == 't') {
    _exit(99);
  }
  return result;
}

// The death of a process loses nothing that was written: waiting for the device would prove
// nothing.
int done() { return 0; }

}  // namespace

extern "C" {

void fail_at(long n, char how, int trace_fd) {
  mode = how;
  trace = trace_fd;
  left = n;
}

ssize_t write(int fd, const void* data, size_t size) {
  if (fd == trace || !hit("write")) {
    return write_through(fd, data, size);
  }
  return half([&](size_t n) { return write_through(fd, data, n); }, size);
}

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) {
  static const auto real = next<ssize_t (*)(int, const void*, size_t, off64_t)>("pwrite64");
  return hit("pwrite") ? half([&](size_t n) { return real(fd, data, n, at); }, size)
                       : real(fd, data, size, at);
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t at) {
  return pwrite64(fd, data, size, at);
}

int fsync(int) { return whole("fsync", EIO, done); }

int fdatasync(int) { return whole("fdatasync", EIO, done); }

int msync(void*, size_t, int) { return whole("msync", EIO, done); }

int ftruncate64(int fd, off64_t size) {
  static const auto real = next<int (*)(int, off64_t)>("ftruncate64");
  return whole("ftruncate", ENOSPC, [&] { return real(fd, size); });
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int posix_fallocate64(int fd, off64_t at, off64_t size) {
  static const auto real = next<int (*)(int, off64_t, off64_t)>("posix_fallocate64");
  const int result = whole("fallocate", ENOSPC, [&] { return real(fd, at, size); });
  return result < 0 ? errno : result;
}

int posix_fallocate(int fd, off_t at, off_t size) { return posix_fallocate64(fd, at, size); }

int rename(const char* from, const char* to) {
  static const auto real = next<int (*)(const char*, const char*)>("rename");
  return whole("rename", EIO, [&] { return real(from, to); });
}

int link(const char* from, const char* to) {
  static const auto real = next<int (*)(const char*, const char*)>("link");
  return whole("link", EIO, [&] { return real(from, to); });
}

int unlink(const char* path) {
  static const auto real = next<int (*)(const char*)>("unlink");
  return whole("unlink", EIO, [&] { return real(path); });
}

int unlinkat(int folder, const char* path, int flags) {
  static const auto real = next<int (*)(int, const char*, int)>("unlinkat");
  return whole("unlinkat", EIO, [&] { return real(folder, path, flags); });
}

int mkdir(const char* path, mode_t bits) {
  static const auto real = next<int (*)(const char*, mode_t)>("mkdir");
  return whole("mkdir", ENOSPC, [&] { return real(path, bits); });
}
}
