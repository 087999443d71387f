// Exchange: the data plane of one process. Routes frames between the publisher and the collectors.
//
// Owns the published sets, the running collectors, the queue of frames to send, the control
// messages that wait for Python, and what is known of each peer's speed and last sign of life.
//
// Sans I/O: a pump (see sink.h) or a test delivers frames, asks for frames to send, and runs the
// timers; the clock is an argument. All methods are thread-safe (one mutex, held for the reduction
// of a few chunks at most; combine() reduces without it). Every queue has a bound. Control messages
// are handed out peer by peer in turn, so that one that sends more than is handled delays itself
// alone. What a peer's owner (its key, where there is one) may have waiting, and have handled in a
// second, counts for all of its connections together: beyond its rate its messages wait, beyond its
// share it loses them, which is an event.
//
// A process may have several runs. The peers of a run are an audience, a number from 1; 0: peers in
// none. A set may be restricted to an audience: it is unknown to all other peers. Audiences have
// turns, and the peers of each have turns within it: of control messages by their count, of chunks
// by their bytes. An audience may have limits of its own, so that its queues leave another room.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/waiting_mutex.hpp"
#include "collect/collector.hpp"
#include "format/wire.hpp"
#include "transfer/hold_ups.hpp"
#include "transfer/outgoing.hpp"
#include "transfer/publisher.hpp"
#include "transfer/silence.hpp"
#include "transfer/sink.h"

namespace fedcore {

struct Event {
  enum class Kind {
    kDone,
    kRejected,
    kStalled,
    kBroken,
    kNoRoom,
    kMalformed,
    kUnknownPeer,
    kRate,
    kConnections,
    kDamaged,
    kRuleFailed
  } kind;
  std::uint64_t collector = 0;
  std::size_t source = 0;
  // Of a rejection; the peer of a malformed frame, of a rate or a number of connections that is
  // exceeded, or an unknown one; a damaged set's id, empty where it is the base of a collection; the
  // trace of a rule that failed.
  std::string code;
  std::string message;
  std::int64_t silent_ms = 0;  // of a stall: for how long the source answers without a chunk
};

struct ControlMessage {
  std::string peer;
  std::string body;
};

// Bounds that depend on the memory there is; in bytes.
struct ExchangeLimits {
  std::uint64_t outgoing = Outgoing::kDefaultLimit;  // of peers whose audience has no limit
  std::uint64_t control_per_peer = 16u << 20;        // waiting; a first message always may
  std::uint64_t control = 64u << 20;  // waiting, of audiences without a limit together
  bool paced = false;  // whether an owner's frames have a rate, and its connections a number
  // Where paced: what an owner may send at once that nobody asked for. More than what may be under
  // way to it, as that is not asked for any more when a collection ends.
  std::uint64_t unasked = 256u << 20;
};

struct OutFrame {
  std::string peer;
  wire::Bytes header;
  std::shared_ptr<MappedFile> keep;
  const std::uint8_t* body = nullptr;
  std::size_t body_size = 0;
};

struct ExchangeStats {
  std::uint64_t bytes_in = 0, bytes_out = 0, frames_in = 0, frames_out = 0, dropped = 0;
  std::uint64_t owners = 0;  // that are known of at present
};

class Exchange {
 public:
  // Requests of one peer that wait to be served; beyond it they are refused as busy.
  static constexpr std::size_t kMaxRequestsPerPeer = 1024;
  // Peers whose last sign of life is kept anyhow; beyond it, those silent for an hour are
  // forgotten.
  static constexpr std::size_t kMaxRemembered = 4096;
  static constexpr std::int64_t kForgetMs = 3'600'000;
  // Events of malformed frames and unknown peers kept for Python; beyond it they are only counted.
  static constexpr std::size_t kMaxMalformedEvents = 64;
  // Control messages of one owner that wait for Python.
  static constexpr std::size_t kMaxControlPerPeer = 1024;
  // Where limits are paced, a first message of an owner that is no larger always has room.
  static constexpr std::size_t kSmallControlBytes = 16 << 10;
  // What is handed out of one owner's messages: at once, and over time.
  static constexpr double kControlBurst = 2000, kControlPerSecond = 1000;
  static constexpr double kControlBurstBytes = 32 << 20, kControlBytesPerSecond = 1 << 20;
  // Frames of one owner, but for the chunks that were asked of it: at once, and over time. One that
  // is malformed counts for several.
  static constexpr double kFrameBurst = 20'000, kFramesPerSecond = 5000, kMalformedFrames = 4;
  // Bytes of one owner that nobody asked for, malformed ones too, over time.
  static constexpr double kUnaskedBytesPerSecond = 16 << 20;
  // Connections of one owner that were heard in the last kLivelyMs.
  static constexpr std::size_t kMaxPeersPerOwner = 32;
  static constexpr std::int64_t kLivelyMs = 10'000;
  // As kMaxRemembered, for those silent for a minute.
  static constexpr std::size_t kMaxContacts = 65'536;
  // A chunk that a peer asks for again, as where its checksum was wrong, is read again and compared
  // with it: for each peer once in that time.
  static constexpr std::int64_t kRereadMs = 60'000;

  // `wait`: how a thread waits while another one has the mutex, perhaps to reduce by a rule that needs
  // Python's GIL.
  explicit Exchange(WaitingMutex::Wait wait = nullptr);

  void publish(const wire::SetId& id, std::shared_ptr<MappedFile> file, std::uint64_t offset,
               std::uint64_t length, std::uint64_t chunk_bytes,
               const std::vector<std::uint32_t>& checksums = {});
  void publish_encoded(const wire::SetId& id, std::shared_ptr<MappedFile> file,
                       std::vector<std::uint64_t> offsets, std::vector<std::uint8_t> encodings,
                       const std::vector<std::uint32_t>& checksums = {});
  void publish_packed(const wire::SetId& id, std::shared_ptr<MappedFile> file, std::uint64_t offset,
                      std::unique_ptr<Packer> packer,
                      const std::vector<std::uint32_t>& checksums = {});
  void withdraw(const wire::SetId& id);
  std::vector<wire::SetId> published() const;
  // Makes a set unknown to all peers but those of one audience; 0: known to all.
  void restrict_to(const wire::SetId& id, std::uint64_t audience);
  // Puts a peer into an audience, out of the one before. Who enrols a peer takes it out again:
  // forget() does not. What it had asked for as one of another audience is dropped.
  void enrol(const std::string& peer, std::uint64_t audience);
  // Takes a peer out of an audience; does nothing where it is in another one.
  void expel(const std::string& peer, std::uint64_t audience);
  // Gives an audience limits of its own, in bytes: of chunks on their way, of control messages that
  // wait.
  void limit_audience(std::uint64_t audience, std::uint64_t outgoing, std::uint64_t control);

  void start(std::shared_ptr<Collector> collector);
  // Adds a source to a running collector that is open, surveys its sources, or closes it; see Collector.
  std::size_t add(std::uint64_t collector_id, Source source);
  void survey(std::uint64_t collector_id, const std::vector<std::size_t>& order);
  void close(std::uint64_t collector_id, const std::vector<std::size_t>& order, Place out,
             std::shared_ptr<Record> record, const Collector::States& states = {},
             const std::optional<Collector::Weights>& weights = std::nullopt);
  void cancel(std::uint64_t collector_id);
  void retry(std::uint64_t collector_id, std::size_t source,
             const std::optional<std::string>& peer);
  // Takes a source out of a collection, whose result becomes that of the others alone. Events of
  // it that wait are forgotten: the number may be another source's from now on.
  void drop(std::uint64_t collector_id, std::size_t source);

  // Combines what is complete of a collection whose chunks are combined aside (collector.hpp), one
  // chunk after the other, while all else goes on; returns once the collection is cancelled. One
  // thread calls it for each.
  void combine(std::uint64_t collector_id);

  // Of each source of a collection that runs: the chunks that are due, and those that came.
  std::vector<std::pair<std::uint64_t, std::uint64_t>> pulls(std::uint64_t collector_id) const;

  void set_limits(const ExchangeLimits& limits);

  // Returns an FC_ verdict. With FC_TAKEN the frame was moved from; otherwise it is untouched.
  int deliver(std::int64_t now_ms, std::string_view peer, const void* header,
              std::size_t header_size, Frame& body);
  std::optional<OutFrame> next_out(std::int64_t now_ms);
  std::int64_t tick(std::int64_t now_ms);
  std::optional<Event> next_event();
  std::optional<ControlMessage> next_control(std::int64_t now_ms);
  // True if something came for Python that it was not told of. Not again before listening() says
  // that it heard.
  bool has_event();
  void listening();

  void heartbeat(std::int64_t interval_ms);
  // Where there is a heartbeat: whether the connection carries nothing any more, so that another
  // one has to be dialled.
  bool silent(std::int64_t now_ms) const;
  // The pump dials anew: what was asked for is asked for again.
  void dialled(std::int64_t now_ms);
  // The pump's socket has connected again by itself, or goes on dialling.
  void reconnected(std::int64_t now_ms);
  // The pump has sent a control message, or looked at what has moved; see Silence.
  void sent(std::uint64_t bytes, std::int64_t now_ms);
  void moved(std::int64_t received, std::int64_t acked, std::int64_t now_ms);
  std::optional<std::int64_t> last_heard(const std::string& peer) const;
  // For how long nothing came from a peer while the pump was reading.
  std::optional<std::int64_t> silent_ms(const std::string& peer, std::int64_t now_ms) const;
  // Until when a peer's silence may mean no more than that a chunk is on its way; 0: it may not.
  std::int64_t busy_until(const std::string& peer) const;
  // A frame could not be sent: there is no connection to the peer at present.
  void unreachable(std::string_view peer);
  void forget(const std::string& peer);
  // Hears nothing more from peers whose id begins with `user` and a NUL, or hears them again.
  void block(const std::string& user, bool blocked);
  // Hears nothing from any peer of this one's owner before `until_ms`.
  void mute(const std::string& peer, std::int64_t until_ms);
  // Throws away what waits of a peer's control messages.
  void discard(const std::string& peer);
  ExchangeStats stats() const;
  // What came from an audience's peers, and went to them, while they were in it.
  ExchangeStats stats_of(std::uint64_t audience) const;

  Outgoing& outgoing() noexcept { return *outgoing_; }
  const FcSink* sink() const noexcept { return &sink_; }

 private:
  struct Contact {
    std::optional<std::int64_t> heard_ms;
    std::int64_t held_up_ms = 0;  // in hold-ups of the pump until then
    std::int64_t busy_until_ms = 0;
    bool unreachable = false;
    bool met = false;      // has sent a control message, or was reported as unknown
    bool counted = false;  // among its owner's peers
    Pace::Known pace;
    wire::SetId set{};           // what it has asked for last
    std::uint64_t reached = 0;   // and up to which chunk
    std::int64_t reread_ms = 0;  // from when on what it asks for again is read again
  };
  // Who is behind one or more peers: the part of a peer's id before the NUL, or all of it.
  struct Owner {
    std::vector<std::string> peers;  // those that were heard lately
    std::size_t waiting = 0;         // control messages, and their bytes
    std::uint64_t waiting_bytes = 0;
    double messages = kControlBurst;  // what may be handed out now; bytes may be owed
    double bytes = kControlBurstBytes;
    double frames = kFrameBurst;
    double unasked = 0;  // bytes that were sent of what nobody asked for, lately
    std::int64_t paced_ms = 0;
    std::int64_t muted_until_ms = 0;
    bool flooded = false;  // and that was told
    bool too_many = false;
  };
  // The control messages of a peer that wait. They count for the audience in which it sent the
  // first of them.
  struct Waiting {
    std::uint64_t audience = 0;
    std::deque<std::string> messages;
  };
  // What the peers of a run, or those of none, have together.
  struct Audience {
    std::deque<std::string> control_turns;  // peers with control messages, round robin
    std::deque<std::string> chunk_turns;    // peers with requests, round robin
    std::uint64_t control_bytes = 0;
    std::optional<std::uint64_t> control_limit;  // nothing: that of all that have none
    // Bytes of chunks that were served, or could have been: the audience with the fewest is next.
    std::uint64_t served = 0;
    ExchangeStats stats;
  };
  struct Request {
    wire::SetId set;
    std::uint64_t next;
    std::uint64_t end;
  };

  int on_get(const std::string& peer, const wire::Header& header, std::int64_t now_ms);
  void look_again(const std::string& peer, const wire::Header& header, std::int64_t now_ms);
  int on_chunk(const std::string& peer, const wire::Header& header, Frame& body,
               std::int64_t now_ms);
  int on_refuse(const std::string& peer, const wire::Header& header);
  bool is_blocked(std::string_view peer) const;
  int on_control(const std::string& peer, const Frame& body);
  Owner& owner_of(std::string_view peer);
  bool is_within_rate(std::string_view peer, std::int64_t now_ms);
  bool may_speak(const std::string& peer, std::int64_t now_ms);
  bool is_due(Owner& owner, std::int64_t now_ms) const;
  std::uint64_t audience_of(const std::string& peer) const;
  void move_to(const std::string& peer, std::uint64_t audience);
  std::pair<std::uint64_t, std::uint64_t> control_use(std::uint64_t audience) const;
  std::optional<ControlMessage> next_control_of(Audience& audience, std::int64_t now_ms);
  void charge(std::string_view peer, double frames, std::size_t bytes = 0);
  static void refill(Owner& owner, std::int64_t now_ms);
  int malformed(std::string_view peer, std::size_t bytes, std::string why);
  void report(Event::Kind kind, std::string_view peer, std::string why);
  void remember(const std::string& peer, wire::Kind kind, std::int64_t now_ms);
  void push(const std::string& peer, const wire::Header& header);
  std::shared_ptr<Collector> known(std::uint64_t collector_id) const;
  Collector& running(std::uint64_t collector_id) const;
  void tell_combiner(const Collector& collector);
  void know_pace(Collector& collector, std::size_t source) const;
  void collect_events(Collector& collector);
  void note_patience(const Collector& collector, std::size_t source, std::int64_t now_ms);
  void discard_where(const std::function<bool(std::string_view)>& which);

  std::optional<OutFrame> next_chunk();
  std::optional<OutFrame> next_chunk_of(std::uint64_t number, Audience& audience);
  std::optional<OutFrame> serve(const std::string& peer, std::uint64_t audience);

  HoldUps hold_ups_;
  mutable WaitingMutex mutex_;
  std::condition_variable_any combinable_;  // chunks to be combined aside, or an end of that
  const std::shared_ptr<Outgoing> outgoing_ = Outgoing::make();
  Publisher publisher_;
  std::vector<std::shared_ptr<Collector>> collectors_;
  std::deque<OutFrame> small_;                                     // frames without a body
  std::unordered_map<std::string, std::deque<Request>> requests_;  // GETs to serve, by peer
  std::unordered_map<std::string, Contact> contacts_;
  std::unordered_map<std::string, Owner> owners_;
  std::map<std::uint64_t, Audience> audiences_;              // as many as runs, and that of none
  std::unordered_map<std::string, std::uint64_t> enrolled_;  // audiences by peer
  std::uint64_t last_audience_ = 0;                          // which had the last control message
  std::uint64_t served_ = 0;  // what the audience of the last chunk had been served before
  std::unordered_set<std::string> blocked_;
  std::deque<Event> events_;
  std::unordered_map<std::string, Waiting> controls_;  // by peer
  ExchangeLimits limits_;
  bool unsignalled_ = false;
  bool signalled_ = false;  // Python was told, and has not looked since
  std::size_t malformed_waiting_ = 0;
  std::int64_t interval_ms_ = 0;
  std::int64_t next_ping_ms_ = 0;
  Silence silence_;
  std::int64_t next_forgetting_ms_ = 0;
  ExchangeStats stats_;
  OutFrame sending_;  // keeps peer and header alive for the pump until the next call
  FcSink sink_;
};

}  // namespace fedcore
