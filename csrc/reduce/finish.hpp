// Finisher: turns combined values (rule.hpp) into the elements of the next version, with states that
// it keeps from version to version. This page is the contract; a kind of finisher is one source file
// beside it, two lines in finishers.inl, and one entry in fedcore/rules/finishers.py.
//
// A kind is a class: a name, a version, the names of its states and of its options, what states
// start with, and a function for one element, which is compiled for each instruction set
// (finish_bodies.inl). The version changes when the same inputs give other bits.
//   - An element of the next version depends on the combined value, the base, the state and the
//     options alone: not on how elements are cut into pieces, on threads or on arrival.
//   - It is computed in binary64 with + - * / and square roots alone, which every processor rounds in
//     the same way, and rounded once to each number that is kept.
//   - The states of version r are read, those of version r + 1 are written elsewhere: a chunk may be
//     reduced more than once. A run without states yet has those that the kind starts with.
//   - What is kept is limited to the finite numbers of its format.
//
// Finishers act on parameters: the tensors of float dtypes that are not plain. Plain ones (buffers,
// such as running variances) keep the combined value, rounded as without a finisher.
// A state has an element for each element of the parameters, F32, or F64 for those of F64. Where
// parameters are F16 or BF16, there is one state more, "master": their elements in F32, to which
// steps are added that would be lost in the narrow format. The model is the master, rounded.
// Each state is a tensor set of its own layout; its tensors have the names of the model's.
// With an average, there is one state more, "ema": ema <- decay * ema + (1 - decay) * x, where x is the
// element as it is kept (F32, or F64 for those of F64), before it is rounded to a narrow format. It
// starts at the base's element, and changes no bit of the model. The kind "none" leaves the combined
// value as it is, for an average alone; users do not name it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/mapped_file.hpp"
#include "format/layout.hpp"
#include "reduce/reducer.hpp"

namespace fedcore {

inline constexpr std::size_t kMaxStates = 4;  // two of a kind, the master, and the average

// One piece of a parameter: at most kernels::kPiece elements. Word is float or double.
template <typename Word>
struct FinishPiece {
  const double* step;  // combined value - base
  double* x;           // the elements of this version; the function makes them the next one's
  const Word* const* before;  // of each state, the elements of this version; nullptr: none yet
  Word* const* after;         // and of the next one
  std::size_t n;
  // For `direct` bodies in place of the first two: elements of the model as they lie there, with no
  // alignment.
  const void* base = nullptr;
  const double* combined = nullptr;
  void* out = nullptr;
};

// For each instruction set, in the order of kernels::level().
template <typename Word>
using FinishBodies = void (*[3])(const double* options, const FinishPiece<Word>& piece);

struct FinisherKind {
  std::string_view name;
  unsigned version;
  std::span<const std::string_view> states;  // at most two
  std::span<const std::string_view> options;
  struct Bodies {
    FinishBodies<float> narrow;
    FinishBodies<double> wide;
    // `narrow` from the model to the model: for F32, and for BF16 with the master as the last state.
    FinishBodies<float> direct, direct_bf16;
  } bodies;
};

// All kinds, in the order in which documentation names them; see finishers.inl.
const std::vector<const FinisherKind*>& finisher_kinds();

// Throws Error{kConfig} that names the known kinds. "none" is the one that changes nothing.
const FinisherKind& find_finisher(std::string_view name);

// A state as the next version is made: its layout, and the place of its flat bytes in a file.
struct FinisherState {
  std::string name;
  std::shared_ptr<const Layout> layout;
};
struct StatePlace {
  std::shared_ptr<MappedFile> file;
  std::uint64_t offset = 0;
  std::vector<std::uint32_t> crcs = {};  // of the chunks of its layout, to be compared; empty: not
};

class FinishedChunk;

// A kind with its options, for the parameters of one layout, and the states of one version. Immutable,
// hence usable from any thread. Cost: O(tensors) memory.
class Finisher {
 public:
  // `plain`: names of tensors. `before`: the places of all states by name; empty: there are none
  // yet. Throws Error{kConfig} for a wrong number of options or no parameter, Error{kLayout} for a
  // plain name that the layout lacks, and Error{kStorage} for states that are not these. `ema`: the
  // part of the average that stays, at least 0 and below 1; nothing: there is no average.
  Finisher(std::shared_ptr<const Layout> layout, const FinisherKind& kind,
           std::vector<double> options, const std::set<std::string>& plain,
           const std::map<std::string, StatePlace>& before, std::optional<double> ema = {});

  const FinisherKind& kind() const noexcept { return kind_; }
  const Layout& layout() const noexcept { return *layout_; }
  const std::vector<FinisherState>& states() const noexcept { return states_; }

  // Bytes of the states of one chunk, at most.
  std::uint64_t chunk_bytes() const noexcept { return chunk_bytes_; }

  // The places of the next version's states, in the order of states(). Throws Error{kStorage} for
  // ones that are not these or can't be written.
  std::vector<StatePlace> check_after(const std::map<std::string, StatePlace>& after) const;

  // The checksum of a range of the model, of which `model_crc` is the checksum, with what the states
  // in `after` hold for it: what FinishedChunk::crc() gave once it was written.
  std::uint32_t crc_of(Range range, std::uint32_t model_crc,
                       const std::vector<StatePlace>& after) const;

  // The file of a state of this version whose bytes, in the chunks of its layout that were read for a
  // range of the model, are not those that were recorded; null if there is none. It is asked once the
  // range is made: what changes before is seen, and the bytes are hot in the cache.
  const MappedFile* changed(Range range) const;

  // Starts writing the states in `after` back to the device, for a range of the model.
  void write_behind(Range range, const std::vector<StatePlace>& after) const;

 private:
  friend class FinishedChunk;

  // A tensor that is a parameter: where it lies in the model, and in each state.
  struct Parameter {
    Dtype dtype;
    std::uint64_t begin, end;
    std::uint64_t at[kMaxStates];
  };
  // A part of a parameter: of its tensor, and the flat bytes of the model that it takes.
  struct Stretch {
    const Parameter* parameter;
    std::uint64_t begin, end;
    // Where it lies in a state, and how many bytes it takes there: 0 in one that does not hold it.
    Range in_state(std::size_t s) const noexcept;
  };

  void add_state(std::string name, const std::vector<TensorSpec>& specs);
  StatePlace checked(const std::map<std::string, StatePlace>& places, std::size_t s) const;
  bool changes_nothing() const noexcept { return kind_.bodies.narrow[0] == nullptr; }
  std::vector<Stretch> stretches(Range range) const;
  // The chunks of a state that hold a part of such ranges of it: the first, and the one behind.
  std::pair<std::uint64_t, std::uint64_t> chunks_of(std::size_t s, Range in) const noexcept;
  // Where they lie in a state, one after the other as in the model; neighbours are merged. Tensors of
  // several dtypes have another order in a state.
  std::vector<Range> ranges(const std::vector<Stretch>& stretches, std::size_t s) const;
  std::uint64_t state_bytes(Range range) const;

  const std::shared_ptr<const Layout> layout_;
  const FinisherKind& kind_;
  const std::vector<double> options_;
  std::vector<FinisherState> states_;
  std::vector<StatePlace> before_;  // empty where there are none yet
  std::vector<Parameter> parameters_;
  std::optional<double> ema_;
  std::uint64_t chunk_bytes_ = 0;
};

// Writes `count` elements of a state to a model's file, rounded to the model's dtype.
void round_state(const MappedFile& state, std::uint64_t offset, MappedFile& model, std::uint64_t to,
                 Dtype dtype, std::uint64_t count);

// What a finisher makes of one chunk after the other, by one thread. Owns the new states of one chunk
// until they are written.
class FinishedChunk final : public Finish {
 public:
  // Both outlive it.
  FinishedChunk(const Finisher& finisher, const std::vector<StatePlace>& after);

  // What apply() gets from now on lies in this range.
  void begin(Range range);
  // `base` is not null.
  void apply(Dtype dtype, std::uint64_t offset, const double* combined, const std::uint8_t* base,
             std::uint8_t* out, std::size_t n) override;
  // The checksum of the range's model, of which `model_crc` is the checksum, with the states behind it.
  std::uint32_t crc(std::uint32_t model_crc) const;
  // Writes the states of the range; what was read of the old ones leaves this process's memory.
  // Throws Error{kStorage}.
  void write() const;

 private:
  template <typename Word>
  void move(Dtype dtype, const double* combined, const FinishPiece<Word>& piece) const;
  template <typename Word>
  void finish(const Finisher::Stretch& stretch, std::size_t place, std::uint64_t offset,
              const double* combined, const std::uint8_t* base, std::uint8_t* out, std::size_t n);

  const Finisher& finisher_;
  const std::vector<StatePlace>& after_;
  std::vector<Finisher::Stretch> stretches_;
  std::vector<std::vector<std::uint64_t>> starts_;  // of each stretch in each state's bytes
  std::vector<std::vector<std::uint8_t>> bytes_;    // of each state, what is new
};

}  // namespace fedcore
