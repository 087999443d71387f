// Sources of own layouts, bases and encodings in a collection, by the two rules of hard_rules.hpp:
// the same bytes in any order, with a spill file, without a lost source, and after a SIGKILL at any
// point; and what a collection refuses before it begins.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/crc32c.hpp"
#include "check.hpp"
#include "collect/collector.hpp"
#include "source_cases.hpp"

using namespace fedcore;

namespace {

std::string folder;
std::uint64_t resident = 0, most_resident = 0;  // bytes of frames that were not released

void release(void* owner) {
  std::uint64_t size = 0;
  std::memcpy(&size, owner, sizeof size);
  resident -= size;
  std::free(owner);
}

void a_feed_asks_for_a_chunk_once_a_turn_and_keeps_it_to_its_last_need() {
  const Feed feed({{0, 3}, {1}, {1, 3}, {}});
  CHECK(feed.count() == 3 && feed.most() == 2 && !feed.identity());
  CHECK(feed.chunk(0) == 0 && feed.chunk(1) == 3 && feed.chunk(2) == 1 && feed.chunk(4) == 3);
  CHECK(feed.end(1) == 2 && feed.end(2) == 3 && feed.first(1) == 1 && feed.first(3) == 3);
  CHECK(feed.wanted(1, 2) && !feed.wanted(1, 3) && feed.wanted(4, 6) && !feed.wanted(3, 5));
  CHECK(feed.find(3, 1) == 1 && feed.find(3, 3) == 4 && !feed.find(2, 0) && !feed.find(9, 0));
  CHECK(feed.left(0, 4) == 3 && feed.left(1, 2) == 2 && feed.left(2, 6) == 5);
  CHECK(feed.near(1, 1) == 2 && feed.near(3, 2) == 5);
  const Feed same(5);
  CHECK(same.identity() && same.chunk(7) == 2 && same.first(7) == 7 && same.end(7) == 7);
  CHECK(same.find(1, 3) == 6 && same.left(3, 8) == 5 && same.most() == 1);
}

// The server's side, whose files are in `folder`, and the sites' answers.
struct Server {
  const Case& c;
  std::shared_ptr<MappedFile> out;
  std::shared_ptr<Spill> spill;
  std::unique_ptr<Collector> collector;
  std::vector<std::size_t> order;  // of the sources that count
  std::vector<GetRequest> waiting;
  std::mt19937_64 dice;
  std::int64_t now = 0;
  std::uint64_t delivered = 0;

  Server(const Case& made, std::uint64_t budget, unsigned seed) : c(made), dice(seed) {
    std::vector<Source> sources = sources_of(c);
    auto record = Record::open(folder + "/record");
    if (record) {
      out = MappedFile::open(folder + "/out", true);
      std::erase_if(sources, [&](const Source& source) {
        return std::none_of(record->sources().begin(), record->sources().end(),
                            [&](const Record::Source& r) { return r.set == source.set; });
      });
    } else {
      ::unlink((folder + "/out").c_str());
      out = MappedFile::create(folder + "/out", c.out->total_bytes());
      std::vector<Record::Source> known;
      for (const Source& s : sources) {
        known.push_back({s.peer, s.set, s.weight, s.base.version});
      }
      record = Record::create(folder + "/record", {}, known, c.out->chunk_count());
    }
    for (const Source& source : sources) {
      order.push_back(source.set[0] - 1u);
    }
    CollectorOptions options{.budget_bytes = budget};
    spill = std::make_shared<Spill>(folder + "/spill", kChunk, 0, 8 * kChunk);
    options.spill = spill;
    options.spill_after_ms = 0;
    options.rule = known_rule(c.rule);
    collector = std::make_unique<Collector>(c.out, std::move(sources), Place{out, 0},
                                            Place{c.base, 0}, options, std::move(record));
  }

  std::size_t site_of(std::size_t source) const { return collector->sources()[source].set[0] - 1u; }

  bool deliver(std::size_t source, std::uint64_t index) {
    const Site& site = c.sites[site_of(source)];
    const std::vector<std::uint8_t>& body = site.bodies[index];
    auto* const memory =
        static_cast<std::uint8_t*>(std::malloc(sizeof(std::uint64_t) + body.size()));
    const std::uint64_t size = body.size();
    std::memcpy(memory, &size, sizeof size);
    std::uint8_t* const bytes = memory + sizeof size;
    std::memcpy(bytes, body.data(), body.size());
    resident += size;
    wire::Header header;
    header.kind = wire::Kind::kChunk;
    header.set = set_of(site_of(source));
    header.index = index;
    header.encoding = site.encodings[index];
    header.length = static_cast<std::uint32_t>(size);
    header.body_crc = crc32c(bytes, size);
    Frame frame(bytes, size, memory, &release);
    ++delivered;
    const bool kept = collector->on_chunk(source, header, frame, now);
    CHECK(kept == !frame);  // it is taken, or whoever delivers it still has it
    most_resident = std::max(most_resident, resident);
    return kept;
  }

  // Answers requests of the sources below `awake`, chunk by chunk in a random order, up to so many
  // chunks.
  void run(std::size_t awake, std::uint64_t chunks) {
    const std::uint64_t end = delivered + chunks;
    for (int idle = 0; idle < 4 && !collector->done() && delivered < end; ++idle) {
      collector->tick(++now);
      while (const auto request = collector->next_request(now)) {
        for (std::uint32_t i = 0; i < request->count; ++i) {
          waiting.push_back({request->source, request->first + i, 1});
        }
      }
      std::vector<std::size_t> may;
      for (std::size_t i = 0; i < waiting.size(); ++i) {
        if (waiting[i].source < awake) {
          may.push_back(i);
        }
      }
      if (!may.empty()) {
        idle = -1;
        const auto at = waiting.begin() + static_cast<std::ptrdiff_t>(may[dice() % may.size()]);
        const GetRequest request = *at;
        waiting.erase(at);
        deliver(request.source, request.first);
      }
    }
  }

  void lose(std::size_t source) {
    order.erase(std::find(order.begin(), order.end(), site_of(source)));
    std::erase_if(waiting, [&](const GetRequest& r) { return r.source == source; });
    collector->drop(source);
  }

  void finish() {
    run(c.sites.size(), 100'000);
    CHECK(collector->done());
    const std::vector<std::uint8_t> expected = c.expected(c, order);
    CHECK(std::memcmp(out->data(), expected.data(), expected.size()) == 0);
    for (std::uint64_t i = 0; i < c.out->chunk_count(); ++i) {
      const Range range = c.out->chunk_range(i);
      CHECK(collector->checksums()[i] == crc32c(out->data() + range.offset, range.nbytes));
    }
  }
};

void remove_files() {
  for (const char* name : {"/out", "/record", "/spill", "/spill-index"}) {
    ::unlink((folder + name).c_str());
  }
}

// What a collection of this budget says when it is refused; empty where it is not.
std::string refusal(const Case& c, std::uint64_t budget) {
  std::string why;
  try {
    const Server server(c, budget, 0);
  } catch (const Error& error) {
    CHECK(error.code() == Errc::kConfig);
    why = error.what();
  }
  remove_files();
  return why;
}

// The budget that a refusal names.
std::uint64_t needed_budget(const Case& c) {
  const std::string why = refusal(c, 2 * kChunk);
  const std::string before = "a budget of ";
  CHECK(why.find(std::string(c.rule.name)) != std::string::npos);
  const std::size_t at = why.find(before);
  CHECK(at != std::string::npos);
  return std::strtoull(why.c_str() + at + before.size(), nullptr, 10) << 10;
}

void a_budget_that_is_too_small_is_refused_with_the_one_that_is_needed() {
  for (const Case& c : {factors_case(Encoding::kRaw), bases_case(Encoding::kRaw)}) {
    const std::uint64_t needed = needed_budget(c);
    CHECK(!refusal(c, needed - 1024).empty());
    CHECK(refusal(c, needed).empty());
  }
}

void neither_the_order_of_arrival_nor_the_budget_changes_a_byte() {
  for (const Case& c : cases()) {
    const std::uint64_t needed = needed_budget(c);
    for (const std::uint64_t budget : {needed, needed + 9 * kChunk, std::uint64_t{1} << 30}) {
      for (unsigned seed = 0; seed < 3; ++seed) {
        most_resident = 0;
        Server(c, budget, seed).finish();
        CHECK(resident == 0 && most_resident <= budget);
        remove_files();
      }
    }
  }
}

void sources_that_are_ahead_are_spilled_and_the_bytes_are_the_same() {
  for (const Case& c : cases()) {
    Server server(c, needed_budget(c), 1);
    server.run(2, 100'000);  // the third answers nothing
    CHECK(server.spill->used() > 0 && !server.collector->done());
    server.finish();
    remove_files();
  }
}

void a_lost_source_leaves_the_bytes_of_the_others_alone() {
  for (const Case& c : cases()) {
    for (std::uint64_t chunks = 0; chunks < 60; chunks += 7) {
      for (std::size_t lost = 0; lost < c.sites.size(); ++lost) {
        Server server(c, needed_budget(c) + chunks % 4 * 5 * kChunk, 3);
        server.run(chunks % 3 == 0 ? 2 : 3, chunks);
        server.lose(lost);
        server.finish();
        remove_files();
      }
    }
  }
}

// Collects in a process of its own, which kills itself after so many chunks.
void killed_after(const Case& c, std::uint64_t budget, std::uint64_t chunks, bool loses) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    Server server(c, budget, 5);
    server.run(2, chunks / 2);
    if (loses) {
      server.lose(0);
    }
    server.run(3, chunks - chunks / 2);
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

void a_process_killed_at_any_point_is_resumed_to_the_same_bytes(std::uint64_t step) {
  for (const Case& c : {factors_case(Encoding::kNf4), factors_case(Encoding::kRaw),
                        bases_case(Encoding::kInt8), bases_case(Encoding::kRaw)}) {
    const std::uint64_t needed = needed_budget(c);
    for (std::uint64_t chunks = 0; chunks < 75; chunks += step) {
      for (const bool loses : {false, true}) {
        const std::uint64_t budget = needed + (chunks / step % 2 == 0 ? 0 : 7 * kChunk);
        killed_after(c, budget, chunks, loses);
        Server server(c, budget, 6);
        if (chunks / step % 3 == 0) {
          server.run(3, 5);
          server.lose(server.order.size() - 1);  // and after the restart, another one
        }
        server.finish();
        remove_files();
      }
    }
  }
}

void what_came_before_a_kill_is_not_pulled_again_but_for_the_windows() {
  for (const Case& c : {factors_case(Encoding::kRaw), bases_case(Encoding::kRaw)}) {
    const std::uint64_t needed = needed_budget(c);
    std::uint64_t all = 0;
    for (const Site& site : c.sites) {
      all += site.layout->chunk_count();
    }
    killed_after(c, needed, all - 3, false);
    Server server(c, needed, 6);
    server.finish();
    CHECK(server.delivered <= 3 + needed / kChunk);
    remove_files();
  }
}

std::vector<CollectorEvent> events_of(const Case& c) {
  Server server(c, 1u << 20, 1);
  server.run(3, 100'000);
  CHECK(!server.collector->done());
  remove_files();
  return server.collector->take_events();
}

void a_value_that_is_not_finite_rejects_its_source_by_name() {
  Case c = factors_case(Encoding::kRaw);
  const std::uint64_t at = tensor_of(*c.sites[1].layout, "b.A").offset + 4 * 11;
  const float bad = std::nanf("");
  std::memcpy(c.sites[1].bodies[at / kChunk].data() + at % kChunk, &bad, sizeof bad);
  const auto events = events_of(c);
  CHECK(events.size() == 1 && events[0].kind == CollectorEvent::Kind::kRejected);
  CHECK(events[0].source == 1 && events[0].code == "nonfinite");
  CHECK(events[0].message == "NaN or infinity in tensor 'b.A', element 11");
}

// A rule that gives numbers that are none.
class Spoilt final : public Combiner {
 public:
  void see(const Layout&, Range, std::span<const View>) override {}
  void combine_seen(Dtype, std::uint64_t, const void*, double* out, std::size_t count) override {
    std::fill_n(out, count, std::nan(""));
  }
};

void a_rule_that_gives_a_value_that_is_not_finite_is_named_and_no_source_is_rejected() {
  Case c = factors_case(Encoding::kRaw);
  c.rule.make = [](const std::vector<double>&) { return std::make_unique<Spoilt>(); };
  const auto events = events_of(c);
  CHECK(events.size() == 1 && events[0].kind == CollectorEvent::Kind::kRuleFailed);
  CHECK(events[0].message.starts_with("the rule 'joined' gave NaN or infinity in tensor '"));
}

void a_base_that_has_changed_stops_the_collection() {
  for (Case c :
       {factors_case(Encoding::kInt8), bases_case(Encoding::kInt8), bases_case(Encoding::kRaw)}) {
    c.sites[2].base->data()[kChunk + 8] ^= 1;
    const auto events = events_of(c);
    CHECK(!events.empty() && events[0].kind == CollectorEvent::Kind::kDamaged);
  }
}

std::string refused_by(const Case& c, const std::vector<Source>& sources, const Rule& rule) {
  CollectorOptions options{.budget_bytes = 1u << 20};
  options.rule = known_rule(rule);
  try {
    Collector(c.out, sources, Place{MappedFile::anonymous(c.out->total_bytes()), 0},
              Place{c.base, 0}, options);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void what_a_rule_does_not_take_is_refused_by_name() {
  const Case adapters_of_three = factors_case(Encoding::kRaw), stale = bases_case(Encoding::kRaw);
  const std::string one = "the rule 'mean' takes sources of one layout and base";
  CHECK(refused_by(stale, sources_of(stale), kMean) == one);
  CHECK(refused_by(stale, sources_of(adapters_of_three), stale.rule) ==
        "the rule 'relative' takes sources of the output's layout");
  std::vector<Source> sources = sources_of(adapters_of_three);
  sources[2].base.version = 4;
  CHECK(refused_by(adapters_of_three, sources, adapters_of_three.rule) ==
        "the rule 'joined' takes updates of one version, got some of 5 and 4");
  sources = sources_of(adapters_of_three);
  sources.push_back(sources[1]);
  CHECK(refused_by(adapters_of_three, sources, adapters_of_three.rule) ==
        "the ranks of a are more than the output has");
  sources = sources_of(stale);
  sources[0].weight = 0.1;  // more than 24 significant bits
  CHECK(refused_by(stale, sources, stale.rule).starts_with("weight 0.1"));
  sources[0].weight = effective_weight(0.1);
  CHECK(refused_by(stale, sources, stale.rule).empty());
}

// Sources are added one by one; what the output depends on is known at the close.
void a_collection_may_be_open_at_first() {
  for (const Case& c : {factors_case(Encoding::kNf4), bases_case(Encoding::kNf4)}) {
    const auto out = MappedFile::anonymous(c.out->total_bytes());
    CollectorOptions options{.budget_bytes = 1u << 20};
    options.rule = known_rule(c.rule);
    Server server(c, 1u << 20, 4);
    server.collector = std::make_unique<Collector>(c.out, 2, Place{c.base, 0}, options);
    server.out = out;
    for (const std::size_t k : {2, 0, 1}) {
      CHECK(server.collector->add(sources_of(c)[k]) < 3);
      server.run(3, 4);
    }
    server.collector->close({1, 0}, Place{out, 0}, nullptr);
    server.order = {0, 2};
    server.finish();
    remove_files();
  }
}

}  // namespace

int main(int argc, char** argv) {
  char made[] = "/tmp/fedcore-sources-XXXXXX";
  CHECK(mkdtemp(made) != nullptr);
  folder = made;
  a_feed_asks_for_a_chunk_once_a_turn_and_keeps_it_to_its_last_need();
  a_budget_that_is_too_small_is_refused_with_the_one_that_is_needed();
  neither_the_order_of_arrival_nor_the_budget_changes_a_byte();
  sources_that_are_ahead_are_spilled_and_the_bytes_are_the_same();
  a_lost_source_leaves_the_bytes_of_the_others_alone();
  a_process_killed_at_any_point_is_resumed_to_the_same_bytes(argc > 1 ? 1 : 6);
  what_came_before_a_kill_is_not_pulled_again_but_for_the_windows();
  a_value_that_is_not_finite_rejects_its_source_by_name();
  a_rule_that_gives_a_value_that_is_not_finite_is_named_and_no_source_is_rejected();
  a_base_that_has_changed_stops_the_collection();
  what_a_rule_does_not_take_is_refused_by_name();
  a_collection_may_be_open_at_first();
  ::rmdir(made);
  return 0;
}
