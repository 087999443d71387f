#include "reduce/finish.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "kernels/kernels.hpp"
#include "reduce/finish_bodies.hpp"

namespace fedcore {
namespace {

constexpr char kMaster[] = "master";
constexpr char kAverage[] = "ema";
constexpr FinisherKind kNone{"none", 1, {}, {}, {}};
constexpr std::uint64_t kNowhere = std::numeric_limits<std::uint64_t>::max();

Dtype state_dtype(Dtype dtype) noexcept { return dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32; }

}  // namespace

const FinisherKind& find_finisher(std::string_view name) {
  if (name == kNone.name) {
    return kNone;
  }
  std::string known;
  for (const FinisherKind* const kind : finisher_kinds()) {
    if (kind->name == name) {
      return *kind;
    }
    known += (known.empty() ? "" : ", ") + std::string(kind->name);
  }
  throw Error(Errc::kConfig,
              "no server optimizer is named '" + std::string(name) + "'; expected one of " + known);
}

Finisher::Finisher(std::shared_ptr<const Layout> layout, const FinisherKind& kind,
                   std::vector<double> options, const std::set<std::string>& plain,
                   const std::map<std::string, StatePlace>& before, std::optional<double> ema)
    : layout_(std::move(layout)), kind_(kind), options_(std::move(options)), ema_(ema) {
  if (options_.size() != kind_.options.size()) {
    throw Error(Errc::kConfig, "the server optimizer '" + std::string(kind_.name) + "' has " +
                                   std::to_string(kind_.options.size()) + " options");
  }
  std::size_t found = 0;
  std::vector<TensorSpec> all, narrow;
  for (const Tensor& tensor : layout_->tensors()) {
    if (plain.contains(tensor.name)) {
      ++found;
    } else if (is_float(tensor.dtype) && tensor.nbytes > 0) {
      all.push_back({tensor.name, state_dtype(tensor.dtype), tensor.shape});
      if (item_size(tensor.dtype) < sizeof(float)) {
        narrow.push_back({tensor.name, Dtype::kF32, tensor.shape});
      }
      Parameter parameter{tensor.dtype, tensor.offset, tensor.offset + tensor.nbytes, {}};
      std::fill(std::begin(parameter.at), std::end(parameter.at), kNowhere);
      parameters_.push_back(parameter);
    }
  }
  if (found != plain.size()) {
    throw Error(Errc::kLayout, "a tensor that is to keep the plain mean is not in the layout");
  }
  if (parameters_.empty()) {
    throw Error(Errc::kConfig, "the model has no tensor on which a server optimizer acts");
  }
  for (const std::string_view name : kind_.states) {
    add_state(std::string(name), all);
  }
  if (!narrow.empty() && !changes_nothing()) {
    add_state(kMaster, narrow);
  }
  if (ema_) {
    add_state(kAverage, all);
  }
  for (std::size_t s = 0; s < states_.size() && !before.empty(); ++s) {
    before_.push_back(checked(before, s));
  }
  for (std::uint64_t index = 0; index < layout_->chunk_count(); ++index) {
    chunk_bytes_ = std::max(chunk_bytes_, state_bytes(layout_->chunk_range(index)));
  }
}

void Finisher::add_state(std::string name, const std::vector<TensorSpec>& specs) {
  const std::size_t s = states_.size();
  const auto layout = std::make_shared<const Layout>(specs, layout_->chunk_bytes());
  std::unordered_map<std::string_view, std::uint64_t> offsets;
  for (const Tensor& tensor : layout->tensors()) {
    offsets.emplace(tensor.name, tensor.offset);
  }
  auto parameter = parameters_.begin();
  for (const Tensor& tensor : layout_->tensors()) {
    if (parameter == parameters_.end() || tensor.offset != parameter->begin ||
        tensor.nbytes != parameter->end - parameter->begin || !is_float(tensor.dtype)) {
      continue;
    }
    if (const auto at = offsets.find(tensor.name); at != offsets.end()) {
      parameter->at[s] = at->second;
    }
    ++parameter;
  }
  states_.push_back({std::move(name), layout});
}

StatePlace Finisher::checked(const std::map<std::string, StatePlace>& places, std::size_t s) const {
  const auto found = places.find(states_[s].name);
  if (found == places.end() || places.size() != states_.size()) {
    throw Error(Errc::kStorage, "the files are not the states of this server optimizer");
  }
  const StatePlace& place = found->second;
  place.file->check_range(place.offset, states_[s].layout->total_bytes());
  if (!place.crcs.empty() && place.crcs.size() != states_[s].layout->chunk_count()) {
    throw Error(Errc::kStorage, "a state has another number of checksums than of chunks");
  }
  if (place.offset % sizeof(double) != 0) {
    throw Error(Errc::kStorage, "the state " + place.file->path() + " is not aligned");
  }
  return place;
}

std::vector<StatePlace> Finisher::check_after(
    const std::map<std::string, StatePlace>& after) const {
  std::vector<StatePlace> places;
  for (std::size_t s = 0; s < states_.size(); ++s) {
    places.push_back(checked(after, s));
    if (!places.back().file->writable()) {
      throw Error(Errc::kStorage, "the state " + places.back().file->path() + " is not writable");
    }
  }
  return places;
}

Range Finisher::Stretch::in_state(std::size_t s) const noexcept {
  if (parameter->at[s] == kNowhere) {
    return {0, 0};
  }
  const std::size_t width = item_size(parameter->dtype);
  const std::size_t kept = item_size(state_dtype(parameter->dtype));
  return {parameter->at[s] + (begin - parameter->begin) / width * kept,
          (end - begin) / width * kept};
}

std::vector<Finisher::Stretch> Finisher::stretches(Range range) const {
  const std::uint64_t end = range.offset + range.nbytes;
  auto at = std::partition_point(parameters_.begin(), parameters_.end(),
                                 [&](const Parameter& p) { return p.end <= range.offset; });
  std::vector<Stretch> found;
  for (; at != parameters_.end() && at->begin < end; ++at) {
    found.push_back({&*at, std::max(at->begin, range.offset), std::min(at->end, end)});
  }
  return found;
}

std::uint64_t Finisher::state_bytes(Range range) const {
  std::uint64_t bytes = 0;
  for (const Stretch& stretch : stretches(range)) {
    for (std::size_t s = 0; s < states_.size(); ++s) {
      bytes += stretch.in_state(s).nbytes;
    }
  }
  return bytes;
}

std::vector<Range> Finisher::ranges(const std::vector<Stretch>& stretches, std::size_t s) const {
  std::vector<Range> found;
  for (const Stretch& stretch : stretches) {
    const Range in = stretch.in_state(s);
    if (in.nbytes == 0) {
      continue;
    }
    if (!found.empty() && found.back().offset + found.back().nbytes == in.offset) {
      found.back().nbytes += in.nbytes;
    } else {
      found.push_back(in);
    }
  }
  return found;
}

std::uint32_t Finisher::crc_of(Range range, std::uint32_t model_crc,
                               const std::vector<StatePlace>& after) const {
  std::uint32_t crc = model_crc;
  const std::vector<Stretch> parts = stretches(range);
  for (std::size_t s = 0; s < states_.size(); ++s) {
    MappedFile& file = *after[s].file;
    for (const Range& in : ranges(parts, s)) {
      const std::uint64_t offset = after[s].offset + in.offset;
      file.populate(offset, in.nbytes);
      crc = crc32c(file.data() + offset, in.nbytes, crc);
      file.release(offset, in.nbytes);
    }
  }
  return crc;
}

std::pair<std::uint64_t, std::uint64_t> Finisher::chunks_of(std::size_t s,
                                                            Range in) const noexcept {
  const std::uint64_t chunk = states_[s].layout->chunk_bytes();
  return {in.offset / chunk, (in.offset + in.nbytes + chunk - 1) / chunk};
}

const MappedFile* Finisher::changed(Range range) const {
  const std::vector<Stretch> parts = stretches(range);
  for (std::size_t s = 0; s < before_.size(); ++s) {
    const StatePlace& before = before_[s];
    std::uint64_t last = kNowhere;  // the chunk that was looked at last
    for (const Range& in : ranges(parts, s)) {
      const auto [first, end] = chunks_of(s, in);
      for (std::uint64_t index = first + (first == last ? 1 : 0);
           index < end && !before.crcs.empty(); ++index) {
        const Range chunk = states_[s].layout->chunk_range(index);
        const std::uint8_t* const bytes = before.file->data() + before.offset + chunk.offset;
        if (crc32c(bytes, chunk.nbytes) != before.crcs[static_cast<std::size_t>(index)]) {
          return before.file.get();
        }
      }
      last = end - 1;
    }
  }
  return nullptr;
}

void Finisher::write_behind(Range range, const std::vector<StatePlace>& after) const {
  const std::vector<Stretch> parts = stretches(range);
  for (std::size_t s = 0; s < states_.size(); ++s) {
    for (const Range& in : ranges(parts, s)) {
      after[s].file->write_behind(after[s].offset + in.offset, in.nbytes);
    }
  }
}

FinishedChunk::FinishedChunk(const Finisher& finisher, const std::vector<StatePlace>& after)
    : finisher_(finisher), after_(after), bytes_(finisher.states().size()) {}

void FinishedChunk::begin(Range range) {
  stretches_ = finisher_.stretches(range);
  starts_.assign(bytes_.size(), {});
  for (std::size_t s = 0; s < bytes_.size(); ++s) {
    std::uint64_t at = 0;
    for (const Finisher::Stretch& stretch : stretches_) {
      starts_[s].push_back(at);
      at += stretch.in_state(s).nbytes;
    }
    bytes_[s].resize(static_cast<std::size_t>(at));
  }
}

void FinishedChunk::apply(Dtype dtype, std::uint64_t offset, const double* combined,
                          const std::uint8_t* base, std::uint8_t* out, std::size_t n) {
  const std::size_t width = item_size(dtype);
  auto next =
      std::partition_point(stretches_.begin(), stretches_.end(),
                           [&](const Finisher::Stretch& stretch) { return stretch.end <= offset; });
  while (n > 0) {
    const bool inside = next != stretches_.end() && next->begin <= offset;
    const std::uint64_t until = inside                     ? next->end
                                : next != stretches_.end() ? next->begin
                                                           : kNowhere;
    const std::size_t count =
        static_cast<std::size_t>(std::min<std::uint64_t>(n, (until - offset) / width));
    const auto place = static_cast<std::size_t>(next - stretches_.begin());
    if (!inside) {
      finish_stages().round[float_place(dtype)](combined, out, count);
    } else if (dtype == Dtype::kF64) {
      finish<double>(*next, place, offset, combined, base, out, count);
    } else {
      finish<float>(*next, place, offset, combined, base, out, count);
    }
    combined += count;
    base += count * width;
    out += count * width;
    offset += count * width;
    n -= count;
    next += inside && offset == next->end ? 1 : 0;
  }
}

// A piece that lies in one parameter.
template <typename Word>
void FinishedChunk::finish(const Finisher::Stretch& stretch, std::size_t place,
                           std::uint64_t offset, const double* combined, const std::uint8_t* base,
                           std::uint8_t* out, std::size_t n) {
  const Word* before[kMaxStates] = {};
  Word* after[kMaxStates] = {};
  const Dtype dtype = stretch.parameter->dtype;
  const bool fresh = finisher_.before_.empty();
  const std::uint64_t skipped = (offset - stretch.begin) / item_size(dtype);
  const std::size_t count = bytes_.size();
  for (std::size_t s = 0; s < count; ++s) {
    after[s] = reinterpret_cast<Word*>(bytes_[s].data() + starts_[s][place]) + skipped;
    if (!fresh) {
      const StatePlace& from = finisher_.before_[s];
      const std::uint64_t at = from.offset + stretch.in_state(s).offset;
      before[s] = reinterpret_cast<const Word*>(from.file->data() + at) + skipped;
    }
  }
  const FinishStages& stages = finish_stages();
  const Word* const* const from_states = fresh ? nullptr : before;
  if constexpr (sizeof(Word) == sizeof(float)) {
    const bool direct = dtype == Dtype::kF32 || dtype == Dtype::kBF16;
    if (direct && !finisher_.ema_ && !finisher_.changes_nothing()) {
      const FinisherKind::Bodies& bodies = finisher_.kind_.bodies;
      const auto& body = dtype == Dtype::kF32 ? bodies.direct : bodies.direct_bf16;
      const FinishPiece<Word> piece{nullptr, nullptr, from_states, after, n, base, combined, out};
      body[kernels::level()](finisher_.options_.data(), piece);
      return;
    }
  }
  double step[kernels::kPiece], x[kernels::kPiece];
  const FinishPiece<Word> piece{step, x, from_states, after, n};
  stages.widen[float_place(dtype)](base, combined, x, step, n);
  const std::size_t average = count - 1;
  if (finisher_.ema_ && fresh) {
    std::transform(x, x + n, after[average], [](double value) { return static_cast<Word>(value); });
  }
  move(dtype, combined, piece);
  if (finisher_.ema_) {
    const Word* const from = fresh ? after[average] : before[average];
    if constexpr (sizeof(Word) == sizeof(double)) {
      stages.average_wide(*finisher_.ema_, from, x, after[average], n);
    } else {
      stages.average(*finisher_.ema_, from, x, after[average], n);
    }
  }
  stages.round[float_place(dtype)](x, out, n);
}

// Makes the elements of a piece the next version's, before they are rounded to the model's format.
template <typename Word>
void FinishedChunk::move(Dtype dtype, const double* combined,
                         const FinishPiece<Word>& piece) const {
  const double* const options = finisher_.options_.data();
  if (finisher_.changes_nothing()) {
    std::copy(combined, combined + piece.n, piece.x);
  } else if constexpr (sizeof(Word) == sizeof(double)) {
    finisher_.kind_.bodies.wide[kernels::level()](options, piece);
  } else {
    const FinishStages& stages = finish_stages();
    const bool narrow = item_size(dtype) < sizeof(float);
    const std::size_t master = finisher_.kind_.states.size();
    if (narrow && piece.before != nullptr) {
      stages.load(piece.before[master], piece.x, piece.n);
    }
    finisher_.kind_.bodies.narrow[kernels::level()](options, piece);
    if (narrow) {
      stages.keep(piece.x, piece.after[master], piece.n);
    }
  }
}

std::uint32_t FinishedChunk::crc(std::uint32_t model_crc) const {
  std::uint32_t crc = model_crc;
  for (const std::vector<std::uint8_t>& bytes : bytes_) {
    crc = crc32c(bytes.data(), bytes.size(), crc);
  }
  return crc;
}

void FinishedChunk::write() const {
  for (std::size_t s = 0; s < bytes_.size(); ++s) {
    const std::uint8_t* from = bytes_[s].data();
    for (const Range& in : finisher_.ranges(stretches_, s)) {
      after_[s].file->write(after_[s].offset + in.offset, from, in.nbytes);
      from += in.nbytes;
      if (!finisher_.before_.empty()) {
        // With the chunks that changed() has read.
        const StatePlace& before = finisher_.before_[s];
        const auto [first, end] = finisher_.chunks_of(s, in);
        const Range last = finisher_.states_[s].layout->chunk_range(end - 1);
        const std::uint64_t begin = finisher_.states_[s].layout->chunk_range(first).offset;
        before.file->release(before.offset + begin, last.offset + last.nbytes - begin);
      }
    }
  }
}

void round_state(const MappedFile& state, std::uint64_t offset, MappedFile& model, std::uint64_t to,
                 Dtype dtype, std::uint64_t count) {
  const std::size_t width = item_size(dtype), kept = item_size(state_dtype(dtype));
  state.check_range(offset, count * kept);
  model.check_range(to, count * width);
  if (!is_float(dtype) || offset % kept != 0) {
    throw Error(Errc::kStorage, "no state of these elements is in " + state.path());
  }
  const FinishStages& stages = finish_stages();
  double x[kernels::kPiece];
  std::uint8_t out[kernels::kPiece * sizeof(double)];
  for (std::uint64_t at = 0; at < count; at += kernels::kPiece) {
    const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(kernels::kPiece, count - at));
    const std::uint8_t* const from = state.data() + offset + at * kept;
    if (dtype == Dtype::kF64) {
      std::memcpy(out, from, n * kept);
    } else {
      stages.load(reinterpret_cast<const float*>(from), x, n);
      stages.round[float_place(dtype)](x, out, n);
    }
    model.write(to + at * width, out, n * width);
  }
}

}  // namespace fedcore
