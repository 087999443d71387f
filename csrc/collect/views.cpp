// The collector's part in rules with views: sources of their own layouts and bases, what of them a
// chunk of the output needs, and how that is made of it.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "collect/collector.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {
namespace {

bool same_tensors(const Layout& a, const Layout& b) {
  return std::equal(a.tensors().begin(), a.tensors().end(), b.tensors().begin(), b.tensors().end(),
                    [](const Tensor& s, const Tensor& t) {
                      return s.name == t.name && s.dtype == t.dtype && s.shape == t.shape;
                    });
}

}  // namespace

void Collector::check_base_for_views() const {
  if (!options_.rule->views() || base_.file) {
    return;
  }
  const std::string name(options_.rule->name);
  if (options_.rule->traits.relative) {
    throw Error(Errc::kConfig, "the rule '" + name + "' adds to a base, and there is none");
  }
  for (const Tensor& tensor : layout_->tensors()) {
    if (!is_float(tensor.dtype)) {
      throw Error(Errc::kConfig, "the rule '" + name + "' needs a base: tensor '" + tensor.name +
                                     "' of " + std::string(dtype_name(tensor.dtype)) +
                                     " is copied from it");
    }
  }
}

void Collector::check_source(const Source& source) const {
  const Rule& rule = *options_.rule;
  const std::string name(rule.name);
  const Layout& layout = layout_of(source);
  if (!rule.views() && (source.layout || source.base.place.file || source.codec)) {
    throw Error(Errc::kConfig, "the rule '" + name + "' takes sources of one layout and base");
  }
  if (layout.chunk_bytes() != layout_->chunk_bytes() || layout.total_bytes() == 0) {
    throw Error(Errc::kLayout, "a source has no bytes, or chunks of another size than the output");
  }
  if (rule.needs == nullptr && !same_tensors(layout, *layout_)) {
    throw Error(Errc::kLayout, "the rule '" + name + "' takes sources of the output's layout");
  }
  const Place& base = base_of(source);
  if (base.file) {
    base.file->check_range(base.offset, layout.total_bytes());
  } else if (rule.traits.relative) {
    throw Error(Errc::kConfig, "the rule '" + name + "' needs the base of each source");
  }
  if (!source.base.crcs.empty() && source.base.crcs.size() != layout.chunk_count()) {
    throw Error(Errc::kLayout, "a source's base must have a checksum of each chunk");
  }
  if (source.codec) {
    if (!same_tensors(source.codec->layout(), layout)) {
      throw Error(Errc::kLayout, "a source's encoding is one of another layout");
    }
    if (source.codec->options().encoding != Encoding::kRaw && !base.file) {
      throw Error(Errc::kLayout, "differences can't be decoded without the base that they are to");
    }
  }
}

std::vector<const Source*> Collector::sources_of(const std::vector<std::size_t>& order) const {
  std::vector<const Source*> found;
  for (const std::size_t k : order) {
    found.push_back(&sources_[k]);
  }
  return found;
}

// Those that count, and another one.
std::vector<const Source*> Collector::sources_with(const Source* another) const {
  std::vector<const Source*> found;
  for (std::size_t k = 0; k < sources_.size(); ++k) {
    if (pulls_[k]->counts) {
      found.push_back(&sources_[k]);
    }
  }
  found.push_back(another);
  return found;
}

// Throws Error{kConfig} with the budget that is needed where that of the collection holds fewer.
void Collector::check_chunks(std::uint64_t chunks, std::size_t sources) const {
  if (chunk_room() >= chunks) {
    return;
  }
  // The budget holds its own release_step(), too: a 16th of it, or 8 MiB.
  const std::uint64_t fixed = beside_bytes() + chunks * layout_->chunk_bytes();
  const std::uint64_t needed = fixed + std::min<std::uint64_t>(8u << 20, fixed / 15 + 1);
  throw Error(Errc::kConfig, "the rule '" + std::string(options_.rule->name) + "' needs " +
                                 std::to_string(chunks) + " chunks of " + std::to_string(sources) +
                                 " sources at the same time, a budget of " +
                                 std::to_string((needed + 1023) >> 10) + " KiB; it is " +
                                 std::to_string(options_.budget_bytes >> 10) + " KiB");
}

// The feeds of these sources together.
std::vector<Feed> Collector::feeds_of(const std::vector<const Source*>& sources) const {
  std::vector<const Layout*> layouts;
  for (const Source* const source : sources) {
    layouts.push_back(&layout_of(*source));
  }
  std::vector<Feed> feeds;
  for (std::size_t k = 0; k < sources.size(); ++k) {
    std::vector<std::vector<std::uint64_t>> needs(layout_->chunk_count());
    for (std::uint64_t index = 0; index < needs.size(); ++index) {
      std::set<std::uint64_t> chunks;
      const Range range = layout_->chunk_range(index);
      for (const Range& part : needed(*options_.rule, *layout_, range, layouts, k)) {
        for (std::uint64_t at = part.offset / layout_->chunk_bytes();
             part.nbytes > 0 && at * layout_->chunk_bytes() < part.offset + part.nbytes; ++at) {
          chunks.insert(layouts[k]->chunk_range(at).offset / layout_->chunk_bytes());
        }
      }
      needs[index].assign(chunks.begin(), chunks.end());
    }
    feeds.emplace_back(needs);
  }
  return feeds;
}

// Throws Error{kConfig, kLayout} where these sources do not go together, or need more memory than
// there is.
void Collector::check_views(const std::vector<const Source*>& sources) const {
  const Rule& rule = *options_.rule;
  for (const Source* const source : sources) {
    if (!rule.traits.relative && source->base.version != sources[0]->base.version) {
      throw Error(Errc::kConfig, "the rule '" + std::string(rule.name) +
                                     "' takes updates of one version, got some of " +
                                     std::to_string(sources[0]->base.version) + " and " +
                                     std::to_string(source->base.version));
    }
  }
  if (!rule.views()) {
    return;
  }
  std::uint64_t chunks = sources.size();
  if (!rule.chunkwise()) {
    chunks = 0;
    for (const Feed& feed : feeds_of(sources)) {
      chunks += feed.most();
    }
  }
  check_chunks(chunks_of_entry() * chunks, sources.size());
}

// Gives each source that counts its feed, and begins to pull anew where the next chunk stands.
void Collector::use_feeds() {
  if (options_.rule->chunkwise()) {
    return;
  }
  const std::vector<const Source*> sources = sources_of(counted_);
  check_views(sources);
  std::vector<Feed> feeds = feeds_of(sources);
  for (std::size_t j = 0; j < counted_.size(); ++j) {
    Pull& pull = *pulls_[counted_[j]];
    pull.feed = std::move(feeds[j]);
    pull.held.clear();
    pull.again.clear();
    pull.due = 0;
    pull.pace.forget_asked();
    pull.ahead = false;
    pull.pressed_ms.reset();
    pull.next = pull.feed.first(next_);
  }
  divide_budget();
}

// Each source has room for what it needs at the same time, and for as many more as the others.
void Collector::divide_views(std::uint64_t chunks, std::uint64_t sources) {
  std::uint64_t least = 0, known = 0;
  for (const auto& pull : pulls_) {
    if (pull->counts) {
      least += chunks_of_entry() * pull->feed.most();
      ++known;
    }
  }
  least += chunks_of_entry() * (std::max(sources, known) - known);
  const std::uint64_t more =
      (chunks - std::min(chunks, least)) / std::max<std::uint64_t>(1, sources);
  window_ = 1 + more;
  for (const auto& pull : pulls_) {
    pull->window = std::min(pull->feed.most() + more, pull->feed.count());
  }
}

// Turns a chunk that has come into its flat bytes, of finite numbers; false, and the source or all
// has failed, where that can't be.
bool Collector::flatten(std::size_t source, std::uint64_t index, Held& chunk) {
  const Source& from = sources_[source];
  const Layout& layout = layout_of(from);
  const Range range = layout.chunk_range(index);
  if (chunk.encoding != Encoding::kRaw) {
    const Place& base = base_of(from);
    const std::uint64_t at = base.offset + range.offset;
    auto memory = std::make_unique_for_overwrite<std::uint8_t[]>(range.nbytes);
    MappedFile::arm();
    codec_of(from)->decode(index, chunk.body(), base.file->data() + at, memory.get());
    const bool same = check_base(from, index);
    base.file->release(at, range.nbytes);
    if (!same) {
      return false;
    }
    std::uint8_t* const bytes = memory.release();
    chunk.frame = Frame(bytes, range.nbytes, bytes,
                        [](void* owner) { delete[] static_cast<std::uint8_t*>(owner); });
    chunk.encoding = Encoding::kRaw;
  }
  for (const Run& run : layout.runs(range)) {
    const std::uint8_t* const values = chunk.frame.data() + (run.offset - range.offset);
    const std::int64_t found = kernels::find_non_finite(run.dtype, values, run.nbytes);
    if (found >= 0) {
      const Location where =
          layout.locate(run.offset + static_cast<std::uint64_t>(found) * item_size(run.dtype));
      fail(source, "nonfinite",
           "NaN or infinity in tensor '" + std::string(where.tensor) + "', element " +
               std::to_string(where.element));
      return false;
    }
  }
  return true;
}

// Whether a source's base is as it was in one chunk of the source; says so and stops where not.
bool Collector::check_base(const Source& source, std::uint64_t index) {
  const Place& base = base_of(source);
  const bool own = &base != &base_;
  const std::vector<std::uint32_t>& crcs = own ? source.base.crcs : options_.base_crcs;
  if (!base.file || crcs.empty()) {
    return true;
  }
  const Range range = layout_of(source).chunk_range(index);
  if (crc32c(base.file->data() + base.offset + range.offset, range.nbytes) == crcs[index]) {
    return true;
  }
  report_base(*base.file, index);
  return false;
}

// Shows what the next chunk needs of a source; false if a slot of the spill file does not hold it.
bool Collector::make_view(std::size_t source, View& view) {
  const Pull& pull = *pulls_[source];
  return pull.feed.all_at(next_, [&](std::uint64_t position) {
    const auto held = pull.held.find(position);
    const std::optional<Body> body =
        held != pull.held.end() ? held->second.body() : spilled_chunk(source, position);
    if (body) {
      view.show(pull.feed.chunk(position), body->data);
    }
    return body.has_value();
  });
}

// The bases that the last chunk was made with are checked, and their pages given back.
bool Collector::check_bases() {
  bool same = check_base(parts_[0].index);
  for (std::size_t j = 0; j < counted_.size() && options_.rule->traits.relative; ++j) {
    const Source& source = sources_[counted_[j]];
    const Feed& feed = pulls_[counted_[j]]->feed;
    same = same && feed.all_at(next_, [&](std::uint64_t position) {
      const std::uint64_t index = feed.chunk(position);
      const Range range = layout_of(source).chunk_range(index);
      const bool whole = check_base(source, index);
      base_of(source).file->release(base_of(source).offset + range.offset, range.nbytes);
      return whole;
    });
  }
  return same;
}

void Collector::report_rule(const std::string& what) {
  events_.push_back({CollectorEvent::Kind::kRuleFailed, 0, "", what});
  stop();
}

// Makes the next chunk from views of all sources, and writes it; false if it can't yet.
bool Collector::reduce_view() {
  Part& part = parts_[0];
  part.index = chunk_of(next_);
  part.views.clear();
  for (const std::size_t k : counted_) {
    const Pull& pull = *pulls_[k];
    const bool here = !pull.failed && pull.feed.all_at(next_, [&](std::uint64_t position) {
      return is_here(pull, position);
    });
    if (!here) {
      return false;
    }
  }
  for (const std::size_t k : counted_) {
    const Place& base = base_of(sources_[k]);
    part.views.emplace_back(layout_of(sources_[k]),
                            base.file ? base.file->data() + base.offset : nullptr);
    if (!make_view(k, part.views.back())) {
      return false;
    }
  }
  const Range range = layout_->chunk_range(part.index);
  if (part.finished) {
    part.finished->begin(range);
  }
  MappedFile::arm();
  std::optional<std::uint64_t> bad;
  try {
    bad = part.reducer->reduce_views(*layout_, range, part.views, base_at(range), part.out.data());
  } catch (const Error& error) {
    report_rule("the rule '" + std::string(options_.rule->name) + "' failed: " + error.what());
    return false;
  }
  if (bad) {
    const Location where = layout_->locate(*bad);
    report_rule("the rule '" + std::string(options_.rule->name) +
                "' gave NaN or infinity in tensor '" + std::string(where.tensor) + "', element " +
                std::to_string(where.element));
    return false;
  }
  checksums_[part.index] = crc32c(part.out.data(), range.nbytes);
  if (!check_bases()) {
    return false;
  }
  if (const MappedFile* const state =
          options_.finisher ? options_.finisher->changed(range) : nullptr) {
    report_state(*state);
    return false;
  }
  if (!write(part, part.out.data())) {
    return false;
  }
  advance();
  return true;
}

}  // namespace fedcore
