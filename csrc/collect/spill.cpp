#include "collect/spill.hpp"

#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>

#include "base/crc32c.hpp"
#include "base/error.hpp"

namespace fedcore {
namespace {

// The index, little-endian: magic, u64 bytes of a slot, key, padding, u32 checksum of the 96 bytes
// before it; then of each slot: set id, u32 chunk, u32 bytes of the body with its encoding in the
// highest 8 bits, u32 checksum of the body, u32 tag. An entry is written with one call after its
// slot's bytes, and lies in one page.
constexpr char kMagic[8] = {'F', 'C', 'S', 'P', 'I', 'L', 'L', '2'};
constexpr std::size_t kCrcAt = 96;
constexpr std::size_t kHeadBytes = 128;
constexpr std::size_t kEntryBytes = 32;
constexpr std::size_t kChunkAt = 16;
constexpr std::size_t kBodyAt = 20;
constexpr std::size_t kBodyCrcAt = 24;
constexpr std::size_t kTagAt = 28;
constexpr unsigned kEncodingShift = 24;
constexpr std::uint32_t kMaxBody = (1u << kEncodingShift) - 1;
constexpr std::uint64_t kBlock = 4096;  // what takes room is counted in these
static_assert(wire::kMaxChunkBytes <= kMaxBody);

using Entry = std::array<std::uint8_t, kEntryBytes>;

std::string folder_of(const std::string& path) {
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash + 1);
}

std::uint64_t index_bytes(std::uint64_t slots) { return kHeadBytes + slots * kEntryBytes; }

std::uint64_t entry_at(Spill::Slot slot) { return index_bytes(slot); }

std::uint64_t blocks(std::uint64_t bytes) { return (bytes + kBlock - 1) / kBlock * kBlock; }

// Ties an entry to its slot and to the head. Never 0, so that an empty entry is none.
std::uint32_t tag_of(const std::uint8_t* entry, Spill::Slot slot, std::uint32_t head_crc) {
  std::uint8_t place[4];
  wire::detail::store(place, slot);
  return std::max<std::uint32_t>(1, crc32c(place, 4, crc32c(entry, kTagAt, head_crc)));
}

}  // namespace

Spill::Spill(std::string path, std::uint64_t slot_bytes, std::uint64_t keep_free,
             std::uint64_t extent_bytes)
    : path_(std::move(path)),
      index_path_(path_ + "-index"),
      slot_bytes_(slot_bytes),
      keep_free_(keep_free),
      extent_bytes_(extent_bytes) {
  if (slot_bytes_ == 0 || slot_bytes_ > kMaxBody) {
    throw Error(Errc::kStorage,
                "a spill file needs slots of at least a byte, and less than 16 MiB");
  }
  if (!take_up()) {
    remove_files();
  }
}

Spill::~Spill() {
  if (file_) {
    ::unlink(index_path_.c_str());
    ::unlink(path_.c_str());
  }
}

void Spill::remove_files() {
  file_.reset();
  index_.reset();
  for (const std::string& path : {index_path_, path_}) {
    if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
      throw Error(Errc::kStorage, "cannot remove " + path + ": " + std::strerror(errno));
    }
  }
}

// --- What a killed process left ---

// Takes the files that are there; false, and nothing has changed, if they are not a whole pair.
bool Spill::take_up() {
  std::shared_ptr<MappedFile> file, index;
  try {
    file = MappedFile::open(path_, true);
    index = MappedFile::open(index_path_, true);
  } catch (const Error&) {
    return false;
  }
  const std::uint8_t* head = index->data();
  if (index->size() < kHeadBytes || std::memcmp(head, kMagic, sizeof kMagic) != 0 ||
      wire::detail::load<std::uint32_t>(head + kCrcAt) != crc32c(head, kCrcAt) ||
      wire::detail::load<std::uint64_t>(head + 8) != slot_bytes_) {
    return false;
  }
  const std::uint64_t slots =
      std::min({file->size() / slot_bytes_, (index->size() - kHeadBytes) / kEntryBytes,
                std::uint64_t{std::numeric_limits<Slot>::max()}});
  slots_ = static_cast<Slot>(slots);
  head_crc_ = wire::detail::load<std::uint32_t>(head + kCrcAt);
  std::copy_n(head + 16, key_.size(), key_.begin());
  contents_.resize(slots_);
  free_.reserve(slots_);
  for (Slot slot = slots_; slot-- > 0;) {
    const std::uint8_t* entry = index->data() + entry_at(slot);
    if (wire::detail::load<std::uint32_t>(entry + kTagAt) != tag_of(entry, slot, head_crc_)) {
      free_.push_back(slot);
      continue;
    }
    wire::SetId set;
    std::copy_n(entry, set.size(), set.begin());
    const auto body = wire::detail::load<std::uint32_t>(entry + kBodyAt);
    const std::uint32_t size =
        std::min<std::uint32_t>(body & kMaxBody, static_cast<std::uint32_t>(slot_bytes_));
    contents_[slot] = {wire::detail::load<std::uint32_t>(entry + kBodyCrcAt), size,
                       static_cast<Encoding>(body >> kEncodingShift), size};
    unclaimed_[set].emplace_back(wire::detail::load<std::uint32_t>(entry + kChunkAt), slot);
  }
  index->release(0, index->size());
  file_ = std::move(file);
  index_ = std::move(index);
  return true;
}

void Spill::begin(const Key& key) {
  {
    const std::lock_guard lock(mutex_);
    if (key == key_) {
      return;
    }
    key_ = key;
    if (index_) {
      write_head();
    }
  }
  free_unclaimed();
}

Spill::Chunks Spill::claim(const wire::SetId& set) {
  const std::lock_guard lock(mutex_);
  auto found = unclaimed_.extract(set);
  return found ? std::move(found.mapped()) : Chunks{};
}

void Spill::free_unclaimed() {
  const std::lock_guard lock(mutex_);
  for (const auto& [set, chunks] : std::exchange(unclaimed_, {})) {
    for (const auto& chunk : chunks) {
      free_.push_back(chunk.second);
    }
  }
}

// --- Slots ---

void Spill::write_head() {
  std::array<std::uint8_t, kHeadBytes> head{};
  std::copy_n(std::begin(kMagic), sizeof kMagic, head.begin());
  wire::detail::store(head.data() + 8, slot_bytes_);
  std::copy(key_.begin(), key_.end(), head.begin() + 16);
  head_crc_ = crc32c(head.data(), kCrcAt);
  wire::detail::store(head.data() + kCrcAt, head_crc_);
  index_->write(0, head.data(), head.size());
}

// Makes both files longer, the index first: a slot has an entry, or there is none.
bool Spill::make_room(std::uint64_t more) {
  const std::uint64_t bytes = (slots_ + more) * slot_bytes_;
  const std::uint64_t entries = index_bytes(slots_ + more);
  try {
    if (!index_) {
      index_ = MappedFile::create(index_path_, entries);
      write_head();
    } else if (index_->size() < entries) {
      index_->grow(entries);
    }
    if (!file_) {
      file_ = MappedFile::create_sparse(path_, bytes);
    } else if (file_->size() < bytes) {
      file_->grow_sparse(bytes);
    }
  } catch (const Error& error) {
    problem_ = error.what();
    if (!file_ && index_) {
      index_.reset();
      ::unlink(index_path_.c_str());
    }
    return false;
  }
  return true;
}

// Whether so many more bytes of the device may be taken. It is asked for an extent at a time, or for
// what is left of one.
bool Spill::has_room(std::uint64_t more) {
  if (more <= granted_) {
    return true;
  }
  std::uint64_t bytes = std::max(more, extent_bytes_);
  struct statvfs disk{};
  if (statvfs(folder_of(path_).c_str(), &disk) == 0) {
    const std::uint64_t left = static_cast<std::uint64_t>(disk.f_bavail) * disk.f_frsize;
    const std::uint64_t room = left - std::min(left, keep_free_);
    if (room < more) {
      problem_ = "less than " + std::to_string(((more + keep_free_) >> 20) + 1) +
                 " MiB free beside " + path_;
      return false;
    }
    bytes = std::min(bytes, room);
  }
  granted_ = bytes;
  return true;
}

bool Spill::grow() {
  const std::uint64_t more = std::max<std::uint64_t>(1, extent_bytes_ / slot_bytes_);
  if (!make_room(more)) {
    return false;
  }
  contents_.resize(static_cast<std::size_t>(slots_ + more));
  free_.reserve(static_cast<std::size_t>(slots_ + more));  // so that free() can't fail
  for (std::uint64_t i = more; i > 0; --i) {
    free_.push_back(slots_ + static_cast<Slot>(i - 1));
  }
  slots_ += static_cast<Slot>(more);
  return true;
}

std::optional<Spill::Slot> Spill::put(const wire::SetId& set, std::uint64_t chunk,
                                      const Body& body) {
  const std::lock_guard lock(mutex_);
  if (body.size > slot_bytes_ || chunk > std::numeric_limits<std::uint32_t>::max()) {
    problem_ = "a chunk does not fit in a slot of " + path_;
    return std::nullopt;
  }
  const std::uint64_t written = free_.empty() ? 0 : contents_[free_.back()].written;
  const std::uint64_t more = blocks(body.size) - std::min(blocks(body.size), blocks(written));
  if (!has_room(more) || (free_.empty() && !grow())) {
    return std::nullopt;
  }
  const Slot slot = free_.back();
  const auto size = static_cast<std::uint32_t>(body.size);
  const std::uint32_t crc = crc32c(body.data, body.size);
  Entry entry;
  std::copy(set.begin(), set.end(), entry.begin());
  wire::detail::store(entry.data() + kChunkAt, static_cast<std::uint32_t>(chunk));
  wire::detail::store(entry.data() + kBodyAt, size | static_cast<std::uint32_t>(body.encoding)
                                                         << kEncodingShift);
  wire::detail::store(entry.data() + kBodyCrcAt, crc);
  wire::detail::store(entry.data() + kTagAt, tag_of(entry.data(), slot, head_crc_));
  try {
    file_->write(slot * slot_bytes_, body.data, body.size);
    index_->write(entry_at(slot), entry.data(), entry.size());
  } catch (const Error& error) {
    problem_ = error.what();
    return std::nullopt;
  }
  granted_ -= more;
  Content& content = contents_[slot];
  content = {crc, size, body.encoding, std::max(size, content.written)};
  free_.pop_back();
  return slot;
}

std::optional<Body> Spill::at(Slot slot) {
  const std::lock_guard lock(mutex_);
  const Content& content = contents_[slot];
  const std::uint64_t offset = slot * slot_bytes_;
  file_->check_range(offset, content.size);
  file_->populate(offset, content.size);
  const Body body{file_->data() + offset, content.size, content.encoding};
  return crc32c(body.data, body.size) == content.crc ? std::optional(body) : std::nullopt;
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
