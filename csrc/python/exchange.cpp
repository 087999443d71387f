// The classes Collector and Exchange of the module fedcore._core: the data plane.

#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "python/bindings.hpp"
#include "transfer/exchange.hpp"
#include "transfer/sink.h"

namespace fedcore {
namespace {

using PySource = std::tuple<py::bytes, py::bytes, py::int_>;

using PyPlace = std::optional<std::tuple<FileHandle*, std::uint64_t>>;

Source to_source(const py::bytes& peer, const py::bytes& set, const py::int_& weight) {
  return {std::string(peer), to_set_id(set), static_cast<double>(to_weights({weight})[0])};
}

py::dict to_dict(const ExchangeStats& stats) {
  py::dict out;
  out["bytes_in"] = stats.bytes_in;
  out["bytes_out"] = stats.bytes_out;
  out["frames_in"] = stats.frames_in;
  out["frames_out"] = stats.frames_out;
  out["dropped"] = stats.dropped;
  out["owners"] = stats.owners;
  return out;
}

Place to_place(const PyPlace& place) {
  return place ? Place{std::get<0>(*place)->share(), std::get<1>(*place)} : Place{};
}

// What a source has of its own: a layout, a base and a codec.
using PyOwn = std::tuple<std::optional<PyLayout>, PyPlace, py::object>;

void add_own(Source& source, const std::optional<PyLayout>& layout, const PyPlace& base,
             const py::object& codec) {
  source.layout = layout ? *layout : nullptr;
  source.base.place = to_place(base);
  source.codec = codec_of(codec);
}

// A thread that reduces by a rule in Python has the exchange, and wants the GIL. A thread that has the
// GIL and wants the exchange gives the GIL up while it waits.
void wait_without_gil(std::mutex& mutex) {
  if (PyGILState_Check() == 0) {
    mutex.lock();
    return;
  }
  const py::gil_scoped_release release;
  mutex.lock();
}

CollectorOptions make_options(std::uint64_t budget_bytes, std::int64_t stall_ms, bool write_behind,
                              std::shared_ptr<Spill> spill, std::int64_t spill_after_ms,
                              const py::object& codec, unsigned threads,
                              std::vector<std::uint32_t> base_checksums, const py::object& rule,
                              std::shared_ptr<Finisher> finisher, bool aside,
                              std::set<std::string> plain, bool survey, const py::int_& base_weight,
                              const py::bytes& digest_key, bool keep_surveyed) {
  const bool none = base_weight.equal(py::int_(0));
  return {.budget_bytes = budget_bytes,
          .stall_ms = stall_ms,
          .write_behind = write_behind,
          .spill = std::move(spill),
          .spill_after_ms = spill_after_ms,
          .codec = codec_of(codec),
          .threads = threads,
          .base_crcs = std::move(base_checksums),
          .rule = to_rule(rule),
          .plain = std::move(plain),
          .aside = aside,
          .survey = survey,
          .keep_surveyed = keep_surveyed,
          .digest_key = std::string(digest_key),
          .base_weight = none ? 0 : static_cast<double>(to_weights({base_weight})[0]),
          .finisher = std::move(finisher)};
}

// Options for one collector: the codec is the collector's alone.
CollectorOptions own_options(const CollectorOptions& options) {
  CollectorOptions own = options;
  if (own.codec) {
    own.codec = std::make_shared<Codec>(*own.codec);
  }
  return own;
}

std::shared_ptr<Collector> open_collector(const PyLayout& layout, std::size_t expected,
                                          const PyPlace& base, const CollectorOptions& options) {
  return std::make_shared<Collector>(layout, expected, to_place(base), own_options(options));
}

std::shared_ptr<Collector> make_collector(const PyLayout& layout,
                                          const std::vector<PySource>& sources,
                                          const FileHandle& out, std::uint64_t out_offset,
                                          const PyPlace& base, const CollectorOptions& options,
                                          std::shared_ptr<Record> record, const PyStates& states,
                                          const std::vector<py::bytes>& digests,
                                          const std::vector<PyOwn>& own_parts) {
  std::vector<Source> checked;
  for (const auto& [peer, set, weight] : sources) {
    checked.push_back(to_source(peer, set, weight));
  }
  if (!own_parts.empty() && own_parts.size() != checked.size()) {
    throw Error(Errc::kLayout, "there must be a layout, base and codec of each source, or None");
  }
  for (std::size_t k = 0; k < own_parts.size(); ++k) {
    const auto& [own_layout, own_base, own_codec] = own_parts[k];
    add_own(checked[k], own_layout, own_base, own_codec);
  }
  if (!digests.empty() && digests.size() != checked.size()) {
    throw Error(Errc::kLayout, "there must be digests of each source");
  }
  for (std::size_t k = 0; k < digests.size(); ++k) {
    const std::string_view bytes = digests[k];
    checked[k].digests.resize(bytes.size() / sizeof(std::uint64_t));
    std::memcpy(checked[k].digests.data(), bytes.data(),
                checked[k].digests.size() * sizeof(std::uint64_t));
  }
  const Place from = to_place(base);
  const Place to{out.share(), out_offset};
  CollectorOptions own = own_options(options);
  const Collector::States places = to_states(states);
  const py::gil_scoped_release release;  // it reads what is reduced
  return std::make_shared<Collector>(layout, std::move(checked), to, from, std::move(own),
                                     std::move(record), places);
}

std::optional<Collector::Weights> to_given(
    const std::optional<std::pair<std::vector<py::int_>, py::int_>>& weights) {
  if (!weights) {
    return std::nullopt;
  }
  Collector::Weights given;
  for (const std::uint64_t weight : to_weights(weights->first)) {
    given.sources.push_back(static_cast<double>(weight));
  }
  if (!weights->second.equal(py::int_(0))) {
    given.base = static_cast<double>(to_weights({weights->second})[0]);
  }
  return given;
}

int deliver(Exchange& exchange, std::int64_t now_ms, const py::bytes& peer,
            const py::buffer& header, const std::optional<py::buffer>& body) {
  const Bytes head(header);
  const Bytes payload(body ? *body : py::buffer(py::bytes("")));
  void* copy = nullptr;
  if (payload.size() > 0) {
    copy = std::malloc(payload.size());
    if (copy == nullptr) {
      throw std::bad_alloc();
    }
    std::memcpy(copy, payload.data(), payload.size());
  }
  Frame frame(copy, payload.size(), copy, std::free);
  const std::string_view from = peer;
  int verdict = 0;
  {
    const py::gil_scoped_release release;
    verdict = exchange.deliver(now_ms, from, head.data(), head.size(), frame);
  }
  return verdict == FC_TAKEN ? FC_DONE : verdict;
}

py::object next_out(Exchange& exchange, std::int64_t now_ms) {
  auto out = exchange.next_out(now_ms);
  if (!out) {
    return py::none();
  }
  const py::bytes header(reinterpret_cast<const char*>(out->header.data()), out->header.size());
  py::object body = py::none();
  if (out->body_size > 0) {
    const auto offset = static_cast<std::uint64_t>(out->body - out->keep->data());
    body = view_of(out->keep, offset, out->body_size);
    body = body.attr("toreadonly")();
  }
  return py::make_tuple(py::bytes(out->peer), header, body);
}

py::object next_event(Exchange& exchange) {
  const auto event = exchange.next_event();
  return event ? to_python(*event) : py::none();
}

py::object next_control(Exchange& exchange, std::int64_t now_ms) {
  const auto message = exchange.next_control(now_ms);
  if (!message) {
    return py::none();
  }
  return py::make_tuple(py::bytes(message->peer), py::bytes(message->body));
}

}  // namespace

void bind_exchange(py::module_& m) {
  const CollectorOptions usual{.budget_bytes = 0};
  py::class_<CollectorOptions>(m, "CollectorOptions",
                               "How a collector works, whatever it collects; all but the budget by "
                               "name.")
      .def(py::init(&make_options), py::arg("budget_bytes"), py::kw_only(),
           py::arg("stall_ms") = usual.stall_ms, py::arg("write_behind") = usual.write_behind,
           py::arg("spill") = nullptr, py::arg("spill_after_ms") = usual.spill_after_ms,
           py::arg("codec") = py::none(), py::arg("threads") = usual.threads,
           py::arg("base_checksums") = std::vector<std::uint32_t>(), py::arg("rule") = "mean",
           py::arg("finisher") = nullptr, py::arg("aside") = usual.aside,
           py::arg("plain") = usual.plain, py::arg("survey") = usual.survey,
           py::arg("base_weight") = 0, py::arg("digest_key") = py::bytes(),
           py::arg("keep_surveyed") = usual.keep_surveyed);
  py::class_<Collector, std::shared_ptr<Collector>>(
      m, "Collector",
      "Pulls K published sets of one layout and reduces them into one output, chunk by chunk.")
      .def(py::init(&make_collector), py::arg("layout"), py::arg("sources"), py::arg("out"),
           py::arg("out_offset"), py::arg("base"), py::arg("options"), py::arg("record") = nullptr,
           py::arg("states") = PyStates(), py::arg("digests") = std::vector<py::bytes>(),
           py::arg("own") = std::vector<PyOwn>())
      .def_static("open", &open_collector, py::arg("layout"), py::arg("expected"), py::arg("base"),
                  py::arg("options"),
                  "One whose sources are added as they are ready, about `expected` of them: see "
                  "Exchange.add and Exchange.close.")
      .def_property_readonly("id", &Collector::id)
      .def_property_readonly("aside", &Collector::aside,
                             "Whether its chunks are combined by Exchange.combine alone.")
      .def_property_readonly("done", &Collector::done)
      .def_property_readonly("surveying", &Collector::surveying,
                             "Whether its sources are measured, and it is to be closed then.")
      .def(
          "digests",
          [](const Collector& c, std::size_t source) {
            if (source >= c.sources().size()) {
              throw Error(Errc::kProtocol, "there is no source " + std::to_string(source));
            }
            const std::vector<std::uint64_t>& of = c.digests(source);
            return py::bytes(reinterpret_cast<const char*>(of.data()),
                             of.size() * sizeof(std::uint64_t));
          },
          py::arg("source"),
          "Of a source: eight bytes for each chunk, which tell whether it is the same when it "
          "comes "
          "again; once the sources are measured.")
      .def_property_readonly(
          "distances", &Collector::distances,
          "Rows of the squared distances of the sources that are left and of the base, the last "
          "one; once they are measured.")
      .def_property_readonly("window", &Collector::window)
      .def_property_readonly("bytes_received", &Collector::bytes_received)
      .def_property_readonly("checksums", &Collector::checksums,
                             "CRC-32C of every chunk of the output, once done.")
      .def(
          "progress",
          [](const Collector& c) {
            return py::make_tuple(c.chunks_reduced(), c.chunk_count(), c.chunks_received());
          },
          "(chunks reduced, chunks in all, chunks received per source).");
  py::class_<Exchange>(m, "Exchange",
                       "The data plane of one process: thread-safe, and without I/O of its own.")
      .def(py::init([] { return std::make_unique<Exchange>(&wait_without_gil); }))
      .def(
          "publish",
          [](Exchange& e, const py::bytes& id, const FileHandle& file, std::uint64_t offset,
             std::uint64_t length, std::uint64_t chunk_bytes,
             const std::vector<std::uint32_t>& checksums) {
            e.publish(to_set_id(id), file.share(), offset, length, chunk_bytes, checksums);
          },
          py::arg("set_id"), py::arg("file"), py::arg("offset"), py::arg("length"),
          py::arg("chunk_bytes"), py::arg("checksums") = std::vector<std::uint32_t>(),
          "Offer a range of a file as a tensor set; its bytes must not change until it is "
          "withdrawn.")
      .def(
          "publish_encoded",
          [](Exchange& e, const py::bytes& id, const FileHandle& file,
             std::vector<std::uint64_t> offsets, const py::bytes& encodings,
             const std::vector<std::uint32_t>& checksums) {
            const std::string_view bytes = encodings;
            e.publish_encoded(to_set_id(id), file.share(), std::move(offsets),
                              {bytes.begin(), bytes.end()}, checksums);
          },
          py::arg("set_id"), py::arg("file"), py::arg("offsets"), py::arg("encodings"),
          py::arg("checksums") = std::vector<std::uint32_t>(),
          "Offer encoded chunks as a tensor set: chunk i is bytes offsets[i] to offsets[i + 1] of "
          "the file, and encodings[i] its encoding.")
      .def(
          "publish_packed",
          [](Exchange& e, const py::bytes& id, const FileHandle& file, std::uint64_t offset,
             const py::object& codec, const FileHandle& packed,
             const std::vector<std::uint32_t>& checksums) {
            e.publish_packed(to_set_id(id), file.share(), offset,
                             std::make_unique<Packer>(codec_of(codec), packed.share()), checksums);
          },
          py::arg("set_id"), py::arg("file"), py::arg("offset"), py::arg("codec"),
          py::arg("packed"), py::arg("checksums") = std::vector<std::uint32_t>(),
          "Offer the flat bytes of the codec's layout; chunks are compressed when they are first "
          "asked for, where that saves 5 %, and kept in the file `packed`, as large as the set.")
      .def(
          "withdraw", [](Exchange& e, const py::bytes& id) { e.withdraw(to_set_id(id)); },
          py::arg("set_id"))
      .def(
          "restrict",
          [](Exchange& e, const py::bytes& id, std::uint64_t audience) {
            e.restrict_to(to_set_id(id), audience);
          },
          py::arg("set_id"), py::arg("audience"),
          "Make a set unknown to all peers but those of one audience; 0: known to all.")
      .def(
          "enrol",
          [](Exchange& e, const py::bytes& peer, std::uint64_t audience) {
            e.enrol(std::string(peer), audience);
          },
          py::arg("peer"), py::arg("audience"),
          "Put a peer into an audience, out of the one before.")
      .def(
          "expel",
          [](Exchange& e, const py::bytes& peer, std::uint64_t audience) {
            e.expel(std::string(peer), audience);
          },
          py::arg("peer"), py::arg("audience"),
          "Take a peer out of an audience; where it is in another one, nothing.")
      .def("limit_audience", &Exchange::limit_audience, py::arg("audience"), py::arg("outgoing"),
           py::arg("control"),
           "Bound, in bytes, for an audience alone: published chunks on their way, and control "
           "messages that wait.")
      .def("published",
           [](const Exchange& e) {
             py::list ids;
             for (const auto& id : e.published()) {
               ids.append(from_set_id(id));
             }
             return ids;
           })
      .def("start", &Exchange::start, py::arg("collector"))
      .def(
          "add",
          [](Exchange& e, const Collector& c, const py::bytes& peer, const py::bytes& set,
             const py::int_& weight, const std::optional<PyLayout>& layout, const PyPlace& base,
             const py::object& codec) {
            Source source = to_source(peer, set, weight);
            add_own(source, layout, base, codec);
            return e.add(c.id(), std::move(source));
          },
          py::arg("collector"), py::arg("peer"), py::arg("set_id"), py::arg("weight"),
          py::kw_only(), py::arg("layout") = std::nullopt, py::arg("base") = std::nullopt,
          py::arg("codec") = py::none(),
          "Pull another source into an open collector; returns its number. For a rule with views, "
          "it may "
          "have a layout of its own, and then a base and a codec for differences to that.")
      .def(
          "survey",
          [](Exchange& e, const Collector& c, const std::vector<std::size_t>& sources) {
            e.survey(c.id(), sources);
          },
          py::arg("collector"), py::arg("sources"),
          "Measure these sources of an open collector, in this order; the others are dropped.")
      .def(
          "close",
          [](Exchange& e, const Collector& c, const std::vector<std::size_t>& sources,
             const FileHandle& out, std::uint64_t out_offset, std::shared_ptr<Record> record,
             const PyStates& states,
             const std::optional<std::pair<std::vector<py::int_>, py::int_>>& weights) {
            e.close(c.id(), sources, Place{out.share(), out_offset}, std::move(record),
                    to_states(states), to_given(weights));
          },
          py::arg("collector"), py::arg("sources"), py::arg("out"), py::arg("out_offset"),
          py::arg("record") = nullptr, py::arg("states") = PyStates(),
          py::arg("weights") = std::nullopt,
          "Reduce these sources of an open or measured collector, in this order, into the output; "
          "the others are dropped. The record, if any, is a new one. `weights`: new ones, and that "
          "of the base.")
      .def(
          "cancel", [](Exchange& e, const Collector& c) { e.cancel(c.id()); }, py::arg("collector"),
          "Forget a collector; running or done.")
      .def(
          "retry",
          [](Exchange& e, const Collector& c, std::size_t source,
             const std::optional<py::bytes>& peer) {
            e.retry(c.id(), source,
                    peer ? std::optional<std::string>(std::string(*peer)) : std::nullopt);
          },
          py::arg("collector"), py::arg("source"), py::arg("peer") = std::nullopt,
          "Ask again for what is outstanding at a source, perhaps under a new peer id.")
      .def(
          "drop", [](Exchange& e, const Collector& c, std::size_t k) { e.drop(c.id(), k); },
          py::arg("collector"), py::arg("source"),
          "Take a source out of a collection; its result becomes that of the others alone.")
      .def(
          "combine",
          [](Exchange& e, const Collector& c) {
            const std::uint64_t id = c.id();
            const py::gil_scoped_release release;
            e.combine(id);
          },
          py::arg("collector"),
          "Combine what is complete of a collector whose chunks are combined aside, until it is "
          "cancelled: a thread of its own calls it.")
      .def(
          "pulls", [](const Exchange& e, const Collector& c) { return e.pulls(c.id()); },
          py::arg("collector"),
          "Of each source of a running collector: chunks that are due, and chunks that came.")
      .def("deliver", &deliver, py::arg("now_ms"), py::arg("peer"), py::arg("header"),
           py::arg("body"),
           "Hand over a received frame: 0 handled, 1 kept, 3 malformed or too much, 4 not heard.")
      .def("next_out", &next_out, py::arg("now_ms"),
           "The next frame to send: (peer, header, body or None), or None.")
      .def("tick", &Exchange::tick, py::arg("now_ms"), py::call_guard<py::gil_scoped_release>(),
           "Run timers; milliseconds until the next one, or -1.")
      .def("next_event", &next_event, "The next event, or None.")
      .def("next_control", &next_control, py::arg("now_ms"),
           "The next control message as (peer, body), peer by peer in turn; or None.")
      .def("has_event", &Exchange::has_event,
           "True if there is news that nobody was told of since `listening`.")
      .def("listening", &Exchange::listening, "Be told of the next news by `has_event`.")
      .def(
          "set_limits",
          [](Exchange& e, std::uint64_t outgoing, std::uint64_t control_per_peer,
             std::uint64_t control, bool paced, std::uint64_t unasked) {
            e.set_limits({outgoing, control_per_peer, control, paced, unasked});
          },
          py::arg("outgoing"), py::arg("control_per_peer"), py::arg("control"),
          py::arg("paced") = false, py::arg("unasked") = ExchangeLimits{}.unasked,
          "Bound, in bytes: published chunks on their way, and control messages that wait; "
          "`paced`: their rate and the connections of one owner, too, and `unasked`: what it may "
          "send at once that nobody asked for.")
      .def_property_readonly(
          "wake_fd", [](Exchange& e) { return e.outgoing().wake_fd(); },
          "Readable when `next_out`, which had nothing, may have something; -1: never.")
      .def("clear_wake", [](Exchange& e) { e.outgoing().clear_wake(); })
      .def_property_readonly(
          "outgoing_bytes", [](Exchange& e) { return e.outgoing().bytes(); },
          "Bytes of published chunks that are resident because they are on their way.")
      .def(
          "mute",
          [](Exchange& e, const py::bytes& peer, std::int64_t until_ms) {
            e.mute(std::string(peer), until_ms);
          },
          py::arg("peer"), py::arg("until_ms"),
          "Hear nothing from any peer of this one's owner before that time.")
      .def(
          "discard", [](Exchange& e, const py::bytes& peer) { e.discard(std::string(peer)); },
          py::arg("peer"), "Throw away what waits of a peer's control messages.")
      .def("heartbeat", &Exchange::heartbeat, py::arg("interval_ms"),
           "Ping peer b'' at this interval; 0: never.")
      .def(
          "silent", &Exchange::silent, py::arg("now_ms"),
          "Whether the connection to peer b'' carries nothing any more and has to be dialled anew.")
      .def("dialled", &Exchange::dialled, py::arg("now_ms"),
           "Note that peer b'' is dialled anew: what was asked for is asked for again.")
      .def("reconnected", &Exchange::reconnected, py::arg("now_ms"),
           "Note that the socket has connected to peer b'' again, or goes on dialling it.")
      .def("sent", &Exchange::sent, py::arg("size"), py::arg("now_ms"),
           "Note a control message that was sent to peer b''.")
      .def("moved", &Exchange::moved, py::arg("received"), py::arg("acked"), py::arg("now_ms"),
           "Note how many bytes the system has received of peer b'' so far, and how many of those "
           "sent "
           "are acknowledged; negative: not known.")
      .def(
          "last_heard",
          [](const Exchange& e, const py::bytes& peer) { return e.last_heard(std::string(peer)); },
          py::arg("peer"), "Clock of the last frame of a peer, or None.")
      .def(
          "silent_ms",
          [](const Exchange& e, const py::bytes& peer, std::int64_t now_ms) {
            return e.silent_ms(std::string(peer), now_ms);
          },
          py::arg("peer"), py::arg("now_ms"),
          "For how many milliseconds nothing came of a peer while the pump was reading, or None.")
      .def(
          "busy_until",
          [](const Exchange& e, const py::bytes& peer) { return e.busy_until(std::string(peer)); },
          py::arg("peer"),
          "Clock until which a peer's silence may mean that a chunk is on its way; 0: it may not.")
      .def(
          "unreachable",
          [](Exchange& e, const py::bytes& peer) { e.unreachable(std::string(peer)); },
          py::arg("peer"), "Note that there is no connection to a peer at present.")
      .def(
          "forget", [](Exchange& e, const py::bytes& peer) { e.forget(std::string(peer)); },
          py::arg("peer"))
      .def(
          "block",
          [](Exchange& e, const py::bytes& user, bool blocked) {
            e.block(std::string(user), blocked);
          },
          py::arg("user"), py::arg("blocked"),
          "Hear nothing more from a user's peers, or hear them again.")
      .def("stats", [](const Exchange& e) { return to_dict(e.stats()); })
      .def(
          "stats_of",
          [](const Exchange& e, std::uint64_t audience) { return to_dict(e.stats_of(audience)); },
          py::arg("audience"), "The bytes and frames of an audience's peers, while in it.")
      .def(
          "capsule",
          [](const Exchange& e) {
            return py::capsule(static_cast<const void*>(e.sink()), FC_SINK_CAPSULE);
          },
          "The sink for fedcore._pump; the exchange must outlive its use.");
}

}  // namespace fedcore
