#include "collect/record.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "base/crc32c.hpp"
#include "base/error.hpp"

namespace fedcore {
namespace {

// The head, little-endian; the checksum is of all of it, itself taken as 0.
constexpr char kMagic[8] = {'F', 'C', 'P', 'R', 'O', 'G', 'R', '3'};
constexpr std::size_t kCountAt = 8;      // u32 sources; 12: 0
constexpr std::size_t kChunksAt = 16;    // u64
constexpr std::size_t kCapacityAt = 24;  // u32
constexpr std::size_t kCrcAt = 28;
constexpr std::size_t kKeyAt = 32;
constexpr std::size_t kSourcesAt = 96;
// A source: set id, binary64 weight, u64 version of its base, u32 length of the name, u32 0, the name.
constexpr std::size_t kLengthAt = 32, kNameAt = 40;
constexpr std::size_t kSourceBytes = kNameAt + Record::kMaxSite;
constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kEntryBytes = 8;
constexpr std::uint64_t kMostSources = 1u << 20;
constexpr std::uint64_t kMostChunks = 1u << 30;

std::uint64_t entries_at(std::uint64_t capacity) {
  return (kSourcesAt + capacity * kSourceBytes + kPage - 1) / kPage * kPage;
}

void put32(std::uint8_t* at, std::uint32_t value) { wire::detail::store(at, value); }
std::uint32_t get32(const std::uint8_t* at) { return wire::detail::load<std::uint32_t>(at); }

}  // namespace

Record::Record(std::shared_ptr<MappedFile> file, const Key& key, std::vector<Source> sources,
               std::uint64_t capacity, std::uint64_t chunk_count)
    : file_(std::move(file)),
      key_(key),
      sources_(std::move(sources)),
      capacity_(capacity),
      chunk_count_(chunk_count) {}

std::shared_ptr<Record> Record::create(const std::string& path, const Key& key,
                                       std::vector<Source> sources, std::uint64_t chunk_count) {
  for (const Source& source : sources) {
    if (source.site.size() > kMaxSite) {
      throw Error(Errc::kConfig, "the site name '" + source.site + "' is too long for a record");
    }
  }
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
    throw Error(Errc::kStorage, "cannot remove " + path + ": " + std::strerror(errno));
  }
  const std::uint64_t capacity = sources.size();
  if (capacity > kMostSources || chunk_count > kMostChunks) {
    throw Error(Errc::kStorage, "too many sources or chunks for a record");
  }
  auto file = MappedFile::create(path, entries_at(capacity) + chunk_count * kEntryBytes);
  std::shared_ptr<Record> made(
      new Record(std::move(file), key, std::move(sources), capacity, chunk_count));
  const std::vector<std::uint8_t> bytes = made->head();
  made->head_crc_ = get32(bytes.data() + kCrcAt);
  try {
    made->file_->write(0, bytes.data(), bytes.size());
  } catch (const Error&) {
    ::unlink(path.c_str());
    throw;
  }
  return made;
}

std::shared_ptr<Record> Record::open(const std::string& path) {
  std::shared_ptr<MappedFile> file;
  try {
    file = MappedFile::open(path, true);
  } catch (const Error&) {
    return nullptr;
  }
  const std::uint8_t* data = file->data();
  if (file->size() < kSourcesAt || std::memcmp(data, kMagic, sizeof kMagic) != 0) {
    return nullptr;
  }
  const std::uint64_t count = get32(data + kCountAt);
  const std::uint64_t capacity = get32(data + kCapacityAt);
  const auto chunks = wire::detail::load<std::uint64_t>(data + kChunksAt);
  if (count > capacity || capacity > kMostSources || chunks > kMostChunks ||
      file->size() != entries_at(capacity) + chunks * kEntryBytes) {
    return nullptr;
  }
  std::vector<Source> sources;
  for (std::uint64_t k = 0; k < count; ++k) {
    const std::uint8_t* at = data + kSourcesAt + k * kSourceBytes;
    Source source;
    std::copy_n(at, source.set.size(), source.set.begin());
    source.weight = std::bit_cast<double>(wire::detail::load<std::uint64_t>(at + 16));
    source.version = wire::detail::load<std::uint64_t>(at + 24);
    const std::size_t length = get32(at + kLengthAt);
    if (length > kMaxSite) {
      return nullptr;
    }
    source.site.assign(reinterpret_cast<const char*>(at + kNameAt), length);
    sources.push_back(std::move(source));
  }
  Key key;
  std::copy_n(data + kKeyAt, key.size(), key.begin());
  const std::uint32_t crc = get32(data + kCrcAt);
  std::shared_ptr<Record> found(
      new Record(std::move(file), key, std::move(sources), capacity, chunks));
  found->head_crc_ = crc;
  // What was read, written again, must give the same bytes: its checksum is that of the whole head.
  const std::vector<std::uint8_t> again = found->head();
  const bool whole = std::memcmp(again.data(), found->file_->data(), again.size()) == 0;
  return whole ? found : nullptr;
}

std::vector<std::uint8_t> Record::head() const {
  std::vector<std::uint8_t> out(static_cast<std::size_t>(kSourcesAt + capacity_ * kSourceBytes));
  std::copy_n(std::begin(kMagic), sizeof kMagic, out.begin());
  put32(out.data() + kCountAt, static_cast<std::uint32_t>(sources_.size()));
  wire::detail::store(out.data() + kChunksAt, chunk_count_);
  put32(out.data() + kCapacityAt, static_cast<std::uint32_t>(capacity_));
  std::copy(key_.begin(), key_.end(), out.begin() + kKeyAt);
  std::uint8_t* at = out.data() + kSourcesAt;
  for (const Source& source : sources_) {
    std::copy(source.set.begin(), source.set.end(), at);
    wire::detail::store(at + 16, std::bit_cast<std::uint64_t>(source.weight));
    wire::detail::store(at + 24, source.version);
    put32(at + kLengthAt, static_cast<std::uint32_t>(source.site.size()));
    std::copy(source.site.begin(), source.site.end(), at + kNameAt);
    at += kSourceBytes;
  }
  put32(out.data() + kCrcAt, crc32c(out.data(), out.size()));
  return out;
}

// Ties an entry to its head and place. Never 0, so that an empty entry is none.
std::uint32_t Record::tag(std::uint64_t index, std::uint32_t crc) const noexcept {
  std::uint8_t bytes[12];
  wire::detail::store(bytes, index);
  put32(bytes + 8, crc);
  return std::max<std::uint32_t>(1, crc32c(bytes, sizeof bytes, head_crc_));
}

std::optional<std::uint32_t> Record::at(std::uint64_t index) const noexcept {
  if (!file_ || index >= chunk_count_) {
    return std::nullopt;
  }
  const std::uint8_t* entry = file_->data() + entries_at(capacity_) + index * kEntryBytes;
  const std::uint32_t crc = get32(entry);
  return get32(entry + 4) == tag(index, crc) ? std::optional(crc) : std::nullopt;
}

void Record::put(std::uint64_t index, std::uint32_t crc) noexcept {
  std::uint8_t entry[kEntryBytes];
  put32(entry, crc);
  put32(entry + 4, tag(index, crc));
  write(entries_at(capacity_) + index * kEntryBytes, entry, sizeof entry);
}

void Record::narrow(const wire::SetId& set) {
  const std::vector<std::uint8_t> none(static_cast<std::size_t>(chunk_count_ * kEntryBytes));
  write(entries_at(capacity_), none.data(), none.size());
  std::erase_if(sources_, [&](const Source& source) { return source.set == set; });
  const std::vector<std::uint8_t> bytes = head();
  head_crc_ = get32(bytes.data() + kCrcAt);
  write(0, bytes.data(), bytes.size());
}

void Record::write(std::uint64_t offset, const void* data, std::size_t size) noexcept {
  if (!file_) {
    return;
  }
  try {
    file_->write(offset, data, size);
  } catch (const Error&) {
    ::unlink(file_->path().c_str());
    file_.reset();
  }
}

}  // namespace fedcore
