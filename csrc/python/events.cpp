// What an exchange reports to Python: one class for each kind of event, with named, read-only fields.

#include <cstdint>
#include <string>
#include <utility>

#include "python/bindings.hpp"
#include "transfer/exchange.hpp"

namespace fedcore {
namespace {

struct CollectorDone {
  std::uint64_t collector;
};
struct SourceRejected {
  std::uint64_t collector;
  std::size_t source;
  std::string code;
  std::string message;
};
struct SourceStalled {
  std::uint64_t collector;
  std::size_t source;
  std::int64_t silent_ms;
};
struct OutputBroken {
  std::uint64_t collector;
  std::string message;
};
struct RuleFailed {
  std::uint64_t collector;
  std::string message;
  std::string trace;
};
struct NoRoom {
  std::uint64_t collector;
  std::string message;
};
struct SetDamaged {
  py::bytes set_id;
  std::string message;
};
struct FrameMalformed {
  py::bytes peer;
  std::string message;
};
struct PeerUnknown {
  py::bytes peer;
};
struct RateExceeded {
  py::bytes peer;
  std::string message;
};
struct ConnectionsExceeded {
  py::bytes peer;
  std::string message;
};

// Binds an aggregate whose fields are named in their order; it is made, compared and shown by them.
template <class T, class... Fields>
void bind_event(py::module_& m, const char* name, const char* doc,
                std::pair<const char*, Fields T::*>... fields) {
  py::class_<T> bound(m, name, doc);
  bound.def(py::init([](Fields... values) { return T{std::move(values)...}; }),
            py::arg(fields.first)...);
  (bound.def_readonly(fields.first, fields.second), ...);
  const auto values = [fields...](const T& event) {
    return py::make_tuple(event.*(fields.second)...);
  };
  bound.def("__eq__", [values](const T& event, const py::object& other) {
    return py::isinstance<T>(other) && values(event).equal(values(other.cast<const T&>()));
  });
  bound.def("__hash__", [values](const T& event) { return py::hash(values(event)); });
  bound.def("__repr__",
            [name, values](const T& event) { return name + std::string(py::repr(values(event))); });
  bound.attr("__match_args__") = py::make_tuple(fields.first...);
}

}  // namespace

py::object to_python(const Event& event) {
  switch (event.kind) {
    case Event::Kind::kDone:
      return py::cast(CollectorDone{event.collector});
    case Event::Kind::kRejected:
      return py::cast(SourceRejected{event.collector, event.source, event.code, event.message});
    case Event::Kind::kStalled:
      return py::cast(SourceStalled{event.collector, event.source, event.silent_ms});
    case Event::Kind::kBroken:
      return py::cast(OutputBroken{event.collector, event.message});
    case Event::Kind::kRuleFailed:
      return py::cast(RuleFailed{event.collector, event.message, event.code});
    case Event::Kind::kNoRoom:
      return py::cast(NoRoom{event.collector, event.message});
    case Event::Kind::kUnknownPeer:
      return py::cast(PeerUnknown{py::bytes(event.code)});
    case Event::Kind::kConnections:
      return py::cast(ConnectionsExceeded{py::bytes(event.code), event.message});
    case Event::Kind::kRate:
      return py::cast(RateExceeded{py::bytes(event.code), event.message});
    case Event::Kind::kDamaged:
      return py::cast(SetDamaged{py::bytes(event.code), event.message});
    case Event::Kind::kMalformed:
      break;
  }
  return py::cast(FrameMalformed{py::bytes(event.code), event.message});
}

void bind_events(py::module_& m) {
  using std::pair;
  bind_event<CollectorDone>(m, "CollectorDone", "All chunks of a collector are reduced.",
                            pair{"collector", &CollectorDone::collector});
  bind_event<SourceRejected>(
      m, "SourceRejected",
      "What a source sends can't be used: nothing is reduced until it is dropped.",
      pair{"collector", &SourceRejected::collector}, pair{"source", &SourceRejected::source},
      pair{"code", &SourceRejected::code}, pair{"message", &SourceRejected::message});
  bind_event<SourceStalled>(
      m, "SourceStalled", "A source answers, but has sent no chunk for so many milliseconds.",
      pair{"collector", &SourceStalled::collector}, pair{"source", &SourceStalled::source},
      pair{"silent_ms", &SourceStalled::silent_ms});
  bind_event<OutputBroken>(m, "OutputBroken", "A collector's output can't be written.",
                           pair{"collector", &OutputBroken::collector},
                           pair{"message", &OutputBroken::message});
  bind_event<RuleFailed>(m, "RuleFailed",
                         "A collector's rule has failed: message says in which chunk, trace where "
                         "in its own code.",
                         pair{"collector", &RuleFailed::collector},
                         pair{"message", &RuleFailed::message}, pair{"trace", &RuleFailed::trace});
  bind_event<NoRoom>(m, "NoRoom",
                     "The spill file can't take a chunk: sources that are ahead have to wait.",
                     pair{"collector", &NoRoom::collector}, pair{"message", &NoRoom::message});
  bind_event<SetDamaged>(
      m, "SetDamaged",
      "The bytes of a published set, or of a collector's base (an empty id), have changed.",
      pair{"set_id", &SetDamaged::set_id}, pair{"message", &SetDamaged::message});
  bind_event<FrameMalformed>(m, "FrameMalformed", "A peer sent a frame that can't be read.",
                             pair{"peer", &FrameMalformed::peer},
                             pair{"message", &FrameMalformed::message});
  bind_event<PeerUnknown>(m, "PeerUnknown",
                          "A ping came from a peer that has not joined this process.",
                          pair{"peer", &PeerUnknown::peer});
  bind_event<RateExceeded>(m, "RateExceeded", "A peer's owner sends more than its rate limit.",
                           pair{"peer", &RateExceeded::peer},
                           pair{"message", &RateExceeded::message});
  bind_event<ConnectionsExceeded>(
      m, "ConnectionsExceeded", "A peer's owner has more connections than it may have.",
      pair{"peer", &ConnectionsExceeded::peer}, pair{"message", &ConnectionsExceeded::message});
}

}  // namespace fedcore
