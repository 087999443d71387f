#include "publisher.hpp"

#include <algorithm>

#include "error.hpp"

namespace fedcore {

void Publisher::publish(const wire::SetId& id, std::shared_ptr<MappedFile> file,
                        std::uint64_t offset, std::uint64_t length, std::uint64_t chunk_bytes,
                        const std::vector<std::uint32_t>& checksums) {
  file->check_range(offset, length);
  if (chunk_bytes == 0 || chunk_bytes > wire::kMaxChunkBytes || length == 0) {
    throw Error(Errc::kLayout, "can't publish " + std::to_string(length) + " bytes in chunks of " +
                                   std::to_string(chunk_bytes));
  }
  if (sets_.contains(id)) {
    throw Error(Errc::kProtocol, "this set id is published already");
  }
  const std::uint64_t chunks = (length + chunk_bytes - 1) / chunk_bytes;
  if (!checksums.empty() && checksums.size() != chunks) {
    throw Error(Errc::kLayout, std::to_string(checksums.size()) + " checksums for " +
                                   std::to_string(chunks) + " chunks");
  }
  std::vector<std::optional<std::uint32_t>> crcs(checksums.begin(), checksums.end());
  crcs.resize(static_cast<std::size_t>(chunks));
  sets_.emplace(id, Set{std::move(file), offset, length, chunk_bytes, std::move(crcs)});
}

std::vector<wire::SetId> Publisher::published() const {
  std::vector<wire::SetId> ids;
  for (const auto& [id, set] : sets_) {
    ids.push_back(id);
  }
  return ids;
}

std::optional<wire::Refusal> Publisher::check(const wire::SetId& id, std::uint64_t first,
                                              std::uint32_t count) const noexcept {
  const auto found = sets_.find(id);
  if (found == sets_.end()) {
    return wire::Refusal::kUnknownSet;
  }
  const std::uint64_t chunks = found->second.crcs.size();
  if (first >= chunks || count > chunks - first) {
    return wire::Refusal::kOutOfRange;
  }
  return std::nullopt;
}

std::optional<PublishedChunk> Publisher::chunk(const wire::SetId& id, std::uint64_t index) {
  const auto found = sets_.find(id);
  if (found == sets_.end()) {
    return std::nullopt;
  }
  Set& set = found->second;
  const std::uint64_t at = index * set.chunk_bytes;
  const std::uint8_t* data = set.file->data() + set.offset + at;
  const auto size = static_cast<std::uint32_t>(std::min(set.chunk_bytes, set.length - at));
  set.file->populate(set.offset + at, size);
  std::optional<std::uint32_t>& crc = set.crcs[static_cast<std::size_t>(index)];
  if (!crc) {
    crc = crc32c(data, size);
  }
  return PublishedChunk{set.file, data, size, *crc};
}

}  // namespace fedcore
