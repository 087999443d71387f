// Collector: pulls K published sets, chunk by chunk, and reduces them into one output.
//
// Owns the received frames that wait for their chunk to be complete, and the order in which chunks
// are asked for. Invariants:
//   - of each source at most its window of chunks is held in memory or under way; a source that is
//     that far ahead waits for the others or, with a spill file, has its chunks put there;
//   - and at most about a second's worth under way (see pace.hpp);
//   - a chunk counts only if its source, set, index, length and checksum are right and it was asked
//     for; what is not right never changes state;
//   - chunk i is reduced when all sources have it, always in source order, into the output and
//     nowhere else; with several threads, chunks that are there are reduced at the same time; the
//     end is reached when each chunk was reduced with the sources that are left.
// Chunks are reduced round and round: position p is chunk p % chunk_count. A source that is dropped
// moves the end to one whole turn from where the reduction stands, so that the others go on where
// they are, and send again only what was reduced with it and lies in no spill file.
// An encoded chunk is checked when it comes, kept as it travelled, in memory and in the spill file, and
// decoded a piece at a time in the pass that reduces it.
// Where the budget does not hold a chunk of each source, a chunk's sources are pulled and folded
// one after the other, in order, into sums of that one chunk, with as many under way as the budget
// holds beside the sums. Nothing is spilled then: each chunk is asked for when its turn comes, so
// no source is ever ahead. The bits are the same. A rule that does not fold needs a chunk of each
// source at the same time, and is refused where the budget does not hold them.
// Sets have the output's layout and base, unless the rule has views (rule.hpp): then each source may
// have its own layout, base and encoding. Which chunks of a source a chunk of the output needs, and
// in which order they are pulled, is the source's feed (feed.hpp), made when the sources are known.
// Such chunks are decoded when they come, and kept until the last chunk of the output that needs them
// is made; one chunk of the output is made at a time. Where the budget does not hold what one needs,
// the collection is refused.
// A slow rule may be combined aside: take_out() gives a chunk that is complete, combine() makes it
// while frames come and go on, and put_back() writes it. One chunk is out at a time, and what it reads
// stays as it is. Where a source that it was made of is lost meanwhile, it counts for nothing.
// A rule of several passes (fedcore/rules/deciding.py) has its sources surveyed first: survey() says which of
// them, and each chunk that they all have is measured, in order: how far apart each two of them and the base
// are. Then close() says which of them count, and with which weights; their chunks are pulled once more, but
// for those that lie in the spill file. A source that is lost in the survey takes its distances with it, and
// no chunk is measured again. With a key, a source that sends other bytes when it is asked once more is
// rejected: else it could be chosen for an update that it does not give. The survey needs a chunk of each source at the same time.
// The base may have a weight, too: it is one more source then, the last one.
// A collection may be open at first: sources are added as they are ready and pulled ahead, as far
// as their windows and then the spill file go, and nothing is reduced until close() says which of
// them count. The order of the reduction is the one given there.
// With a record, a collection of the same sources goes on where the one of a
// process that was killed stood: with what is reduced, as far as the output holds it, and with what
// was spilled of a source. Sans I/O: frames in, requests and events out, the clock is an argument.
// Not thread-safe: Exchange holds the lock; progress counters may be read from any thread, and
// combine() needs no lock.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/digest.hpp"
#include "base/mapped_file.hpp"
#include "base/workers.hpp"
#include "codec/codec.hpp"
#include "collect/feed.hpp"
#include "collect/pace.hpp"
#include "collect/record.hpp"
#include "collect/source.hpp"
#include "collect/spill.hpp"
#include "format/layout.hpp"
#include "format/wire.hpp"
#include "reduce/families.hpp"
#include "reduce/finish.hpp"
#include "reduce/reducer.hpp"
#include "reduce/survey.hpp"

namespace fedcore {

struct CollectorOptions {
  std::uint64_t budget_bytes;
  std::int64_t stall_ms = 2000;
  // Whether to start writing the output to the device while it is filled, for a sync that follows.
  bool write_behind = false;
  // Where chunks go of a source whose window has been full for spill_after_ms; null: nowhere.
  std::shared_ptr<Spill> spill = nullptr;
  std::int64_t spill_after_ms = 250;
  // What encoded chunks are checked with as they come, and decoded onto the base; null: all must be
  // raw. It is the collector's alone.
  std::shared_ptr<Codec> codec = nullptr;
  // Chunks that are reduced at the same time, each by a thread and into a buffer of its own; fewer
  // where the buffers would take more than an eighth of the budget.
  unsigned threads = 1;
  // CRC-32C of each chunk of the base, which a chunk that is reduced with it is compared with;
  // empty: it is not checked.
  std::vector<std::uint32_t> base_crcs = {};
  // What combines the sources.
  std::shared_ptr<const Rule> rule = known_rule(kMean);
  // Names of tensors, such as buffers, whose elements get the mean whatever the rule is. Not for a rule
  // with views.
  std::set<std::string> plain = {};
  // Whether a slow rule without views is combined by whoever takes chunks out, and by nobody else.
  bool aside = false;
  // Whether sources are surveyed first. It needs a base, and a rule that folds.
  bool survey = false;
  // Whether chunks that are measured go to the spill file, as far as there is room, for the second pass.
  bool keep_surveyed = false;
  // The key of the digests that chunks of a survey have (digest.hpp); empty: they have none.
  std::string digest_key = {};
  // What the base weighs as one more source, as check_weights() takes it; 0: it is none.
  double base_weight = 0;
  // What makes the output's elements of what is combined, with states; null: they are rounded. It
  // needs a base.
  std::shared_ptr<const Finisher> finisher = nullptr;
};

struct GetRequest {
  std::size_t source;
  std::uint64_t first;
  std::uint32_t count;
};

struct CollectorEvent {
  // kRejected: nothing more is asked of the source, and nothing is reduced until it is dropped.
  // kBroken: the output can't be written; no source is at fault.
  // kNoRoom: a chunk could not be spilled; sources that are ahead are held back from now on.
  // kDamaged: the base, or a state, is not what it was; nothing is reduced any more.
  // kRuleFailed: the rule has failed; no source is at fault, and nothing is reduced any more.
  enum class Kind { kDone, kRejected, kStalled, kBroken, kNoRoom, kDamaged, kRuleFailed } kind;
  std::size_t source = 0;
  std::string code;  // of kRuleFailed: the rule's own trace of the failure
  std::string message;
  std::int64_t silent_ms = 0;  // kStalled: for how long the source answers without a chunk
};

class Collector {
 public:
  using States = std::map<std::string, StatePlace>;
  static constexpr std::uint32_t kMaxRange = 16;
  static constexpr int kMaxBadChunks = 3;
  // Chunks reduced in one call, so that a long tail of them does not keep the lock and the frames
  // that wait; tick() goes on with it.
  static constexpr int kMaxAtOnce = 16;
  // So many chunks are read back from the spill file together; where there are more sources, they
  // are folded one after the other. A rule that does not fold reads back those of all sources.
  static constexpr std::uint64_t kReadTogether = 4;

  // Open, for about `expected` sources, among which the budget is divided. Throws
  // Error{kLayout, kStorage} for a base that is too small or has too few checksums, or differences
  // without a base, and Error{kConfig} for a rule that does not fold and needs a larger budget, or
  // a rule with views that lacks a base.
  Collector(std::shared_ptr<const Layout> layout, std::size_t expected, Place base,
            CollectorOptions options);
  // Closed. Throws what close() throws, too, and Error{kStorage} for a record of another
  // collection. Reads what is reduced.
  Collector(std::shared_ptr<const Layout> layout, std::vector<Source> sources, Place out,
            Place base, CollectorOptions options, std::shared_ptr<Record> record = nullptr,
            const States& states = {});
  ~Collector();
  Collector(const Collector&) = delete;
  Collector& operator=(const Collector&) = delete;

  std::uint64_t id() const noexcept { return id_; }
  const std::vector<Source>& sources() const noexcept { return sources_; }
  bool open() const noexcept { return open_; }

  // While open: pulls another source from now on, and returns which it is: the first that was
  // dropped, whose place it takes, or a new one. Throws Error{kConfig}, and changes nothing, where
  // the rule does not fold and the budget holds no chunk of it, and Error{kConfig, kLayout} for a
  // layout or base of its own that the rule does not take. Where a feed depends on all sources, none
  // is pulled before the close.
  std::size_t add(Source source);
  // While open, with options.survey: measures these sources, in this order, and drops the others. The work
  // that this makes possible is done by tick(), and ends with kDone. Throws as close() does, and changes
  // nothing.
  void survey(const std::vector<std::size_t>& order);
  // Whether it measures, or has measured and is to be closed.
  bool surveying() const noexcept { return survey_ != nullptr; }
  // Once measured: the squared distances of the sources that are left, in their order, and of the base, the
  // last one: rows of a matrix.
  std::vector<std::vector<double>> distances() const;

  // Of a source: a digest of each chunk that came, by index, or 0; empty where there is none.
  const std::vector<std::uint64_t>& digests(std::size_t source) const noexcept {
    return pulls_[source]->digests;
  }

  // How much the sources that count weigh, in their order, and the base; for close().
  struct Weights {
    std::vector<double> sources;
    double base = 0;
  };
  // While open, or once measured: these sources count, reduced in this order into the output; the others
  // are dropped. `weights`: in place of those that they were added with, and of the base's.
  // The work that this makes possible is done by tick(). Throws Error{kWeight, kLayout, kStorage,
  // kProtocol}, and changes nothing, for no source, a bad weight, one that can't count, or an
  // output that is too small. `record`: a new record, or null. `states`: the places of the states
  // that the finisher writes, if there is one.
  void close(const std::vector<std::size_t>& order, Place out, std::shared_ptr<Record> record,
             const States& states = {}, const std::optional<Weights>& weights = std::nullopt);

  // Chunks that each source may have in memory or under way; the first ones have one more each
  // where the budget leaves room.
  std::uint64_t window() const noexcept { return window_; }

  // Which source a set from a peer is, if any that was not dropped.
  std::optional<std::size_t> find(const std::string& peer, const wire::SetId& set) const noexcept;

  // True if the frame was taken (moved from); otherwise it is untouched. What it completes is
  // reduced here or, with several threads, by the next tick().
  bool on_chunk(std::size_t source, const wire::Header& header, Frame& frame, std::int64_t now_ms);
  void on_refuse(std::size_t source, wire::Refusal reason);
  // Another frame has come from a peer. As frames come in order, chunks that it was to send long
  // before are lost. Returns which source the peer is, if chunks of it are due.
  std::optional<std::size_t> on_sign(const std::string& peer, std::int64_t now_ms) noexcept;

  // The next range to ask for, or nothing at present.
  std::optional<GetRequest> next_request(std::int64_t now_ms);
  // Asks silent sources again, and goes on with what can be reduced. Returns ms until the next
  // check, or -1.
  std::int64_t tick(std::int64_t now_ms);
  // Asks for everything that is outstanding at a source again, perhaps under a new peer id.
  void retry(std::size_t source, const std::optional<std::string>& peer);
  // Takes a source out: the result becomes that of the others alone, bit for bit. The work that
  // this makes possible is done by tick().
  void drop(std::size_t source);
  void stop() noexcept;

  // A chunk that is reduced: what of, with what, and what came out.
  struct Part {
    std::uint64_t index = 0;
    std::vector<Body> inputs;
    std::vector<View> views;                  // in place of inputs
    std::unique_ptr<FinishedChunk> finished;  // null without a finisher
    std::unique_ptr<Reducer> reducer;
    std::unique_ptr<ChunkSurvey> survey;  // measures in place of the reducer; or null
    std::vector<std::uint8_t> out;        // hot in the cache when it is written out
    std::uint32_t crc = 0;
    std::optional<BadValue> bad;
    std::optional<RuleError> failed;
    bool base_changed = false;
    const MappedFile* changed_state = nullptr;
  };

  // Whether chunks are combined aside; see the options.
  bool aside() const noexcept {
    return options_.aside && options_.rule->slow && !options_.rule->views() &&
           !options_.rule->traits.folds;
  }
  // Where they are: the next chunk, if it is complete and none is out; null otherwise. The end is
  // noticed here, too.
  std::unique_ptr<Part> take_out();
  // Combines what was taken out. Without a lock, as long as the collector lives; throws nothing.
  void combine(Part& part) const noexcept;
  // Writes it, unless it counts no longer. The collector may have been stopped.
  void put_back(std::unique_ptr<Part> part);

  // What is known of a source's speed, for the next collection from it.
  const Pace::Known& pace(std::size_t source) const noexcept {
    return pulls_[source]->pace.known();
  }
  void set_pace(std::size_t source, const Pace::Known& known) noexcept {
    pulls_[source]->pace.start(known);
  }
  // For how long from now a source may be silent, as chunks may be on their way; 0: none are due.
  std::int64_t patience_ms(std::size_t source) const noexcept;
  // Sources that are due and silent, which a ping would tell from those that are gone.
  std::vector<std::size_t> take_probes() { return std::exchange(probes_, {}); }

  std::vector<CollectorEvent> take_events() { return std::exchange(events_, {}); }
  // Of a source: chunks that it was asked for and that have not come, and chunks that came.
  std::uint64_t due(std::size_t source) const noexcept { return pulls_[source]->due; }
  std::uint64_t received(std::size_t source) const noexcept {
    return pulls_[source]->received.load(std::memory_order_relaxed);
  }
  bool active() const noexcept { return state_ == State::kActive; }

  // Any thread.
  bool done() const noexcept { return done_.load(std::memory_order_acquire); }
  std::uint64_t chunks_reduced() const noexcept { return reduced_.load(std::memory_order_relaxed); }
  std::uint64_t chunk_count() const noexcept { return layout_->chunk_count(); }
  std::uint64_t bytes_received() const noexcept { return bytes_.load(std::memory_order_relaxed); }
  std::vector<std::uint64_t> chunks_received() const;

  // CRC-32C of every chunk of the output, once done; empty where chunks were passed on unchanged.
  const std::vector<std::uint32_t>& checksums() const noexcept { return checksums_; }

 private:
  enum class State { kActive, kDone, kFailed };

  // A chunk in memory: its flat bytes, or what they are decoded from when they are reduced.
  struct Held {
    Frame frame;
    Encoding encoding = Encoding::kRaw;
    Body body() const noexcept { return {frame.data(), frame.size(), encoding}; }
  };

  struct Pull {
    Feed feed;                               // its positions are those below
    bool counts = true;                      // false: dropped
    bool failed = false;                     // rejected, and not dropped yet
    bool folded = false;                     // its chunk at the next position is in the sums
    std::uint64_t window = 1;                // chunks in memory and under way, at most
    std::uint64_t rank = 0;                  // of those that count, how many are before it
    std::uint64_t next = 0;                  // first position that was never asked for
    std::uint64_t due = 0;                   // asked for and not come yet
    std::set<std::uint64_t> again;           // positions to ask for again; they are due
    std::map<std::uint64_t, Held> held;      // chunks in memory, by position
    std::vector<std::uint32_t> spilled;      // slot + 1 of each chunk, or 0; empty before the first
    std::vector<std::uint64_t> digests;      // of each chunk, or 0; empty: they are not asked for
    bool ahead = false;                      // what it sends goes to the spill file
    std::optional<std::int64_t> pressed_ms;  // since when its window has been full
    int bad_in_a_row = 0;
    Pace pace;
    std::int64_t heard_ms = 0;   // last chunk, or when something was first or last asked for
    std::int64_t sign_ms = 0;    // last frame of another kind
    std::int64_t probed_ms = 0;  // last in take_probes()
    std::int64_t silent_ms = 0;  // time in a row in which it answered without a chunk
    std::atomic<std::uint64_t> received{0};
  };

  std::uint64_t chunk_of(std::uint64_t position) const noexcept {
    return position % layout_->chunk_count();
  }
  static bool is_spilled(const Pull& pull, std::uint64_t position) noexcept {
    return !pull.spilled.empty() && pull.spilled[pull.feed.chunk(position)] != 0;
  }
  bool is_here(const Pull& pull, std::uint64_t position) const noexcept {
    return pull.held.contains(position) || is_spilled(pull, position) ||
           (pull.folded && position == next_);
  }
  bool is_pulled(const Pull& pull) const noexcept { return pull.counts && !pull.failed; }
  bool differences() const noexcept {
    return options_.codec && options_.codec->options().encoding != Encoding::kRaw;
  }
  // Differences are added to pages of the base, which are given back in steps; finishers and rules
  // with views read it.
  bool reads_base() const noexcept {
    return differences() || options_.finisher || options_.rule->views() || options_.survey ||
           base_weight_ > 0;
  }
  // Whether a chunk of each source is needed at the same time.
  bool together() const noexcept { return options_.survey || !options_.rule->traits.folds; }
  // Whether the base is one more source.
  bool base_counts() const noexcept { return survey_ || base_weight_ > 0; }
  // The same of a chunk of it.
  Body base_body(const Range& range) const { return {base_at(range), range.nbytes}; }
  // Of what is reduced, pages are given back so many bytes at a time.
  std::uint64_t release_step() const noexcept {
    return std::min<std::uint64_t>(8u << 20, options_.budget_bytes / 16);
  }

  const Layout& layout_of(const Source& source) const noexcept {
    return source.layout ? *source.layout : *layout_;
  }
  const Place& base_of(const Source& source) const noexcept {
    return source.base.place.file || source.layout ? source.base.place : base_;
  }
  Codec* codec_of(const Source& source) const noexcept {
    return source.codec || source.layout ? source.codec.get() : options_.codec.get();
  }

  void find_plain();
  void check_source(const Source& source) const;
  void check_base_for_views() const;
  std::vector<Feed> feeds_of(const std::vector<const Source*>& sources) const;
  void check_views(const std::vector<const Source*>& sources) const;
  std::vector<const Source*> sources_with(const Source* another) const;
  std::vector<const Source*> sources_of(const std::vector<std::size_t>& order) const;
  std::uint64_t chunks_of_entry() const noexcept { return options_.rule->traits.relative ? 2 : 1; }
  void check_chunks(std::uint64_t chunks, std::size_t sources) const;
  void use_feeds();
  void divide_views(std::uint64_t chunks, std::uint64_t sources);
  bool flatten(std::size_t source, std::uint64_t index, Held& chunk);
  bool make_view(std::size_t source, View& view);
  bool reduce_view();
  bool check_bases();
  void report_rule(const std::string& what);
  void check_order(const std::vector<std::size_t>& order,
                   const std::optional<Weights>& weights) const;
  void check_out(const Place& out) const;
  void check_surveys() const;
  void drop_others(const std::vector<std::size_t>& order);
  void measure(Part& part) const;
  std::vector<std::size_t> rows_of_counted() const;
  void add_distances(const Part& part);
  void end_survey();
  void keep_surveyed();
  void begin_digests(std::size_t source);
  bool same_as_before(std::size_t source, std::uint64_t index, const Held& chunk);
  void use_sources();
  void divide_budget();
  std::uint64_t chunk_room() const noexcept;
  void check_room(std::size_t sources) const;
  std::uint64_t beside_bytes() const noexcept;
  void check_states(const States& states) const;
  void begin(const std::vector<std::size_t>& order, Place out, std::shared_ptr<Record> record,
             const States& states);
  // Bytes that a part takes beside the inputs: the output of a chunk, and its states.
  std::uint64_t part_bytes() const noexcept { return layout_->chunk_bytes() + state_bytes(); }
  // Of the states of a chunk, what is read and what is written.
  std::uint64_t state_bytes() const noexcept {
    return options_.finisher ? 2 * options_.finisher->chunk_bytes() : 0;
  }
  std::vector<bool> verified();
  void resume_reduced();
  void take_spilled(std::size_t source);
  std::int64_t spill_after_ms() const noexcept;
  std::optional<std::uint64_t> position_of(const Pull& pull, std::uint64_t index) const noexcept;
  std::optional<std::uint64_t> outstanding(const Pull& pull, std::uint64_t index) const noexcept;
  void keep(std::size_t source, std::uint64_t position, Held chunk);
  bool spill(std::size_t source, std::uint64_t position, const Held& chunk);
  bool recycle();
  std::uint64_t spill_room(const Pull& pull) const noexcept;
  bool start_spilling(std::size_t source, std::int64_t now_ms);
  void forget_chunks(Pull& pull) noexcept;
  bool fits(std::size_t source, const wire::Header& header, std::size_t size) const;
  const char* unpack(std::size_t source, const wire::Header& header, Frame& frame, Held& chunk);
  void ask_again(Pull& pull);
  std::int64_t check_silence(std::size_t source, std::int64_t now_ms);
  void probe(std::size_t source, std::int64_t now_ms);
  bool gather(Part& part);
  unsigned gather_more();
  bool all_held(std::uint64_t position) const noexcept;
  bool enough_held() const noexcept;
  bool fold_all(std::uint64_t index);
  std::optional<Body> spilled_chunk(std::size_t source, std::uint64_t position);
  bool is_body(std::size_t source, std::uint64_t index, const Body& body);
  bool fold_next();
  void reject_value(const BadValue& bad);
  bool write(const Part& part, const std::uint8_t* result);
  void fold_base(const Range& range);
  bool finish_fold(std::uint64_t index);
  void rewind();
  std::uint64_t near_end(std::size_t source) const noexcept;
  void reduce_ready();
  bool reduce_some();
  void reduce(Part& part) const;
  const std::uint8_t* base_at(const Range& range) const;
  bool base_changed(std::uint64_t index) const;
  bool check_base(std::uint64_t index);
  bool check_base(const Source& source, std::uint64_t index);
  void report_base(const MappedFile& file, std::uint64_t index);
  void report_state(const MappedFile& state);
  void report_rule(std::uint64_t index, const RuleError& error);
  bool reduce_parts(unsigned count);
  bool settle(const Part& part);
  void copy_spilled(Part& part);
  void advance();
  void finish();
  void release_behind();
  std::optional<GetRequest> request_again(std::size_t source, std::int64_t now_ms);
  std::optional<GetRequest> request_next(std::size_t source, std::int64_t now_ms);
  void fail(std::size_t source, std::string code, std::string message);

  const std::uint64_t id_;
  const std::shared_ptr<const Layout> layout_;
  std::vector<Source> sources_;
  const std::size_t expected_;
  bool open_ = true;
  Place out_;
  const Place base_;
  const CollectorOptions options_;
  // Which chunks of the output are reduced, from the sources as they are given and in no other way;
  // null: nobody goes on after this process. It is the collector's alone.
  std::shared_ptr<Record> record_;
  std::vector<StatePlace> states_;  // that the finisher writes
  std::vector<Range> plain_;        // what options_.plain names, where the rule is not the mean
  // Sums of squares, (order_.size() + 1)^2 of them, while sources are surveyed and until they are closed.
  std::unique_ptr<std::vector<double>> survey_;
  double base_weight_;
  std::optional<Digest> digest_;
  bool pass_on_ = false;  // the one source's chunks go to the output as they are
  std::uint64_t window_ = 1;
  std::uint64_t group_ = 0;  // chunks under way at a time where sources are folded; 0: they are not
  std::size_t folded_ = 0;   // sources in the sums of the next chunk
  std::vector<std::unique_ptr<Pull>> pulls_;
  std::vector<std::size_t> order_;    // the sources as they were given at the close
  std::vector<std::size_t> counted_;  // those of them that count
  std::vector<Part> parts_;           // the next chunk, and those after it that are reduced with it
  bool taken_ = false;                // whether a part is taken out,
  bool stale_ = false;                // it counts no longer,
  std::vector<Held> lent_;            // and what it reads that is its own, or was let go of since
  std::unique_ptr<Workers> workers_;
  bool one_by_one_ = false;  // the next chunk is to be folded
  std::vector<std::uint32_t> checksums_;
  std::uint64_t next_ = 0;      // next position to reduce
  std::uint64_t end_ = 0;       // where all is done
  std::uint64_t released_ = 0;  // positions up to which pages were given back
  // Spilled chunks that were reduced: kept for a turn without a source, recycled for want of room.
  std::deque<std::pair<std::size_t, std::uint64_t>> used_;
  bool no_room_ = false;
  bool work_left_ = false;  // stopped by kMaxAtOnce, a source was dropped, or more is awaited
  std::size_t turn_ = 0;    // whose request comes next
  State state_ = State::kActive;
  std::vector<CollectorEvent> events_;
  std::vector<std::size_t> probes_;
  std::atomic<bool> done_{false};
  std::atomic<std::uint64_t> reduced_{0};
  std::atomic<std::uint64_t> bytes_{0};
};

}  // namespace fedcore
