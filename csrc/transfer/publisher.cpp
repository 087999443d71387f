#include "transfer/publisher.hpp"

#include <algorithm>
#include <string>

#include "base/crc32c.hpp"
#include "base/error.hpp"

namespace fedcore {
namespace {

// The checksums of so many chunks, of which none or all are given.
std::vector<std::optional<std::uint32_t>> known(const std::vector<std::uint32_t>& checksums,
                                                std::uint64_t chunks) {
  if (!checksums.empty() && checksums.size() != chunks) {
    throw Error(Errc::kLayout, std::to_string(checksums.size()) + " checksums for " +
                                   std::to_string(chunks) + " chunks");
  }
  std::vector<std::optional<std::uint32_t>> crcs(checksums.begin(), checksums.end());
  crcs.resize(static_cast<std::size_t>(chunks));
  return crcs;
}

// Reads a byte of each page: a page that is gone becomes zeros now, and not while the system sends
// it.
void touch(const std::uint8_t* data, std::uint64_t size) noexcept {
  constexpr std::uint64_t kPage = 4096;
  const volatile std::uint8_t* const bytes = data;
  std::uint8_t seen = 0;
  for (std::uint64_t at = 0; at < size; at += kPage) {
    seen = static_cast<std::uint8_t>(seen ^ bytes[at]);
  }
  static_cast<void>(seen);
}

}  // namespace

void Publisher::publish(const wire::SetId& id, std::shared_ptr<MappedFile> file,
                        std::uint64_t offset, std::uint64_t length, std::uint64_t chunk_bytes,
                        const std::vector<std::uint32_t>& checksums) {
  file->check_range(offset, length);
  if (chunk_bytes == 0 || chunk_bytes > wire::kMaxChunkBytes || length == 0) {
    throw Error(Errc::kLayout, "can't publish " + std::to_string(length) + " bytes in chunks of " +
                                   std::to_string(chunk_bytes));
  }
  const std::uint64_t chunks = (length + chunk_bytes - 1) / chunk_bytes;
  add(id,
      Set{std::move(file), offset, length, chunk_bytes, known(checksums, chunks), {}, {}, nullptr});
}

void Publisher::publish_encoded(const wire::SetId& id, std::shared_ptr<MappedFile> file,
                                std::vector<std::uint64_t> offsets,
                                std::vector<std::uint8_t> encodings,
                                const std::vector<std::uint32_t>& checksums) {
  const std::size_t chunks = encodings.size();
  if (chunks == 0 || offsets.size() != chunks + 1) {
    throw Error(Errc::kLayout, std::to_string(offsets.size()) + " offsets and " +
                                   std::to_string(chunks) + " encodings of encoded chunks");
  }
  for (std::size_t i = 0; i < chunks; ++i) {
    if (offsets[i] >= offsets[i + 1] || offsets[i + 1] - offsets[i] > wire::kMaxChunkBytes) {
      throw Error(Errc::kLayout, "encoded chunk " + std::to_string(i) + " has a bad length");
    }
  }
  const std::uint64_t length = offsets.back() - offsets.front();
  file->check_range(offsets.front(), length);
  const std::uint64_t first = offsets.front();
  add(id, Set{std::move(file), first, length, 0, known(checksums, chunks), std::move(offsets),
              std::move(encodings), nullptr});
}

void Publisher::publish_packed(const wire::SetId& id, std::shared_ptr<MappedFile> file,
                               std::uint64_t offset, std::unique_ptr<Packer> packer,
                               const std::vector<std::uint32_t>& checksums) {
  const Layout& layout = packer->layout();
  file->check_range(offset, layout.total_bytes());
  add(id, Set{std::move(file),
              offset,
              layout.total_bytes(),
              layout.chunk_bytes(),
              known(checksums, layout.chunk_count()),
              {},
              {},
              std::move(packer)});
}

void Publisher::add(const wire::SetId& id, Set set) {
  if (!sets_.emplace(id, std::move(set)).second) {
    throw Error(Errc::kProtocol, "this set id is published already");
  }
}

std::vector<wire::SetId> Publisher::published() const {
  std::vector<wire::SetId> ids;
  for (const auto& [id, set] : sets_) {
    ids.push_back(id);
  }
  return ids;
}

void Publisher::restrict_to(const wire::SetId& id, std::uint64_t audience) noexcept {
  if (const auto found = sets_.find(id); found != sets_.end()) {
    found->second.audience = audience;
  }
}

std::optional<wire::Refusal> Publisher::check(const wire::SetId& id, std::uint64_t first,
                                              std::uint32_t count,
                                              std::uint64_t audience) const noexcept {
  const auto found = sets_.find(id);
  if (found == sets_.end() || (found->second.audience != 0 && found->second.audience != audience)) {
    return wire::Refusal::kUnknownSet;
  }
  const std::uint64_t chunks = found->second.crcs.size();
  if (first >= chunks || count > chunks - first) {
    return wire::Refusal::kOutOfRange;
  }
  return std::nullopt;
}

std::optional<PublishedChunk> Publisher::find(const wire::SetId& id, std::uint64_t index) {
  const auto found = sets_.find(id);
  if (found == sets_.end()) {
    return std::nullopt;
  }
  Set& set = found->second;
  const auto i = static_cast<std::size_t>(index);
  const bool encoded = !set.encodings.empty();
  const std::uint64_t at = set.begin(index);
  const std::uint64_t end = set.end(index);
  if (set.packer) {
    if (!set.packer->knows(index)) {
      set.file->populate(at, end - at);
      if (!set.is_as_it_was(index)) {  // its receiver could not tell once it is compressed
        return PublishedChunk{set.file, set.file->data() + at, static_cast<std::uint32_t>(end - at),
                              wire::kRaw};
      }
    }
    if (const auto packed = set.packer->get(index, set.file->data() + at)) {
      set.file->release(at, end - at);
      const auto& file = set.packer->file();
      return PublishedChunk{file, file->data() + packed->offset, packed->size,
                            packed->encoding_byte};
    }
  }
  return PublishedChunk{set.file, set.file->data() + at, static_cast<std::uint32_t>(end - at),
                        encoded ? set.encodings[i] : wire::kRaw};
}

std::uint64_t Publisher::Set::begin(std::uint64_t index) const noexcept {
  return encodings.empty() ? offset + index * chunk_bytes
                           : offsets[static_cast<std::size_t>(index)];
}

std::uint64_t Publisher::Set::end(std::uint64_t index) const noexcept {
  return encodings.empty() ? std::min(begin(index) + chunk_bytes, offset + length)
                           : offsets[static_cast<std::size_t>(index) + 1];
}

bool Publisher::Set::is_as_it_was(std::uint64_t index) const noexcept {
  const std::optional<std::uint32_t>& crc = crcs[static_cast<std::size_t>(index)];
  const std::uint64_t at = begin(index);
  return !crc || crc32c(file->data() + at, end(index) - at) == *crc;
}

std::optional<std::string> Publisher::reread(const wire::SetId& id, std::uint64_t first,
                                             std::uint64_t end) {
  const auto found = sets_.find(id);
  if (found == sets_.end()) {
    return std::nullopt;
  }
  const Set& set = found->second;
  for (std::uint64_t index = first; index < std::min<std::uint64_t>(end, set.crcs.size());
       ++index) {
    const bool same = set.is_as_it_was(index);
    set.file->release(set.begin(index), set.end(index) - set.begin(index));
    const std::string& path = set.file->path();
    if (!set.file->whole()) {
      return path + " became shorter while it was served, or its disk could not read it";
    }
    if (!same) {
      return path + " has changed while it was served: chunk " + std::to_string(index) +
             " is not what it was";
    }
  }
  return std::nullopt;
}

std::uint32_t Publisher::checksum(const wire::SetId& id, std::uint64_t index) {
  const auto chunk = find(id, index);
  if (!chunk) {
    throw Error(Errc::kProtocol, "there is no chunk " + std::to_string(index) + " of this set");
  }
  Set& set = sets_.at(id);
  chunk->file->populate(static_cast<std::uint64_t>(chunk->data - chunk->file->data()), chunk->size);
  touch(chunk->data, chunk->size);
  if (chunk->encoding_byte != wire::kRaw && set.packer) {
    if (const auto packed = set.packer->get(index, nullptr)) {
      return packed->crc;
    }
  }
  std::optional<std::uint32_t>& crc = set.crcs[static_cast<std::size_t>(index)];
  if (!crc) {
    crc = crc32c(chunk->data, chunk->size);
  }
  return *crc;
}

}  // namespace fedcore
