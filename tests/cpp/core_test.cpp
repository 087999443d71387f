// What only C++ can see: reads and writes past the end of a buffer, threads that hit the exchange
// at the same time, and a mutated frame in front of the parser, all under the sanitizers.

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "check.hpp"
#include "guarded.hpp"
#include "kernels/kernels.hpp"
#include "reduce/rule.hpp"
#include "transfer/exchange.hpp"

using namespace fedcore;

namespace {

void every_level_gives_the_baselines_bits_within_bounds() {
  std::mt19937_64 random(7);
  for (const Dtype dtype : {Dtype::kF64, Dtype::kF32, Dtype::kF16, Dtype::kBF16, Dtype::kI32}) {
    for (const std::size_t count : {1u, 7u, 8u, 9u, 1023u, 1025u, 3001u}) {
      const std::size_t bytes = count * item_size(dtype);
      GuardedBuffer a(bytes), b(bytes), expected(bytes), out(bytes);
      for (GuardedBuffer* input : {&a, &b}) {
        for (std::size_t i = 0; i < bytes; ++i) {
          input->data()[i] = static_cast<std::uint8_t>(random());
        }
        // Clear the top exponent bit of each element: every value is finite, subnormals included.
        for (std::size_t i = item_size(dtype) - 1; i < bytes; i += item_size(dtype)) {
          input->data()[i] &= 0xBF;
        }
      }
      const void* inputs[] = {a.data(), b.data()};
      const double weights[] = {3, 16777215};
      kernels::select("baseline");
      CHECK(kernels::mean(dtype, inputs, weights, 2, 16777218, nullptr, expected.data(), bytes));
      for (const std::string& level : kernels::available()) {
        kernels::select(level);
        CHECK(kernels::mean(dtype, inputs, weights, 2, 16777218, nullptr, out.data(), bytes));
        CHECK(std::memcmp(out.data(), expected.data(), bytes) == 0);
      }
    }
  }
}

wire::SetId set_id(std::uint8_t value) {
  wire::SetId id{};
  id[0] = value;
  return id;
}

Frame copy_of(const OutFrame& out) {
  void* copy = std::malloc(out.body_size == 0 ? 1 : out.body_size);
  if (out.body_size > 0) {
    std::memcpy(copy, out.body, out.body_size);
  }
  return Frame(copy, out.body_size, copy, std::free);
}

struct World {
  Exchange server, north, south;
  std::shared_ptr<const Layout> layout = std::make_shared<Layout>(
      std::vector<TensorSpec>{{"w", Dtype::kF32, {40'001}}, {"n", Dtype::kI64, {3}}}, 4096);
  std::shared_ptr<MappedFile> out = MappedFile::anonymous(layout->total_bytes());
  std::shared_ptr<Collector> collector;

  World() {
    std::uint8_t which = 1;
    for (Exchange* site : {&north, &south}) {
      auto file = MappedFile::anonymous(layout->total_bytes());
      auto* values = reinterpret_cast<float*>(file->data() + 24);
      for (int i = 0; i < 40'001; ++i) {
        values[i] = static_cast<float>(i) * which;
      }
      site->publish(set_id(which), file, 0, layout->total_bytes(), 4096);
      ++which;
    }
    collector = std::make_shared<Collector>(
        layout, std::vector<Source>{{"north", set_id(1), 1}, {"south", set_id(2), 3}},
        Place{out, 0}, Place{}, CollectorOptions{.budget_bytes = 64 << 10, .threads = 3});
    server.start(collector);
  }

  void check_result() const {
    CHECK(collector->done());
    const auto* values = reinterpret_cast<const float*>(out->data() + 24);
    for (int i = 0; i < 40'001; ++i) {
      CHECK(values[i] == static_cast<float>(i * 7.0 / 4.0));
    }
  }
};

// Every frame is delivered whole in the end, but before it comes a mutated copy, and now and then
// it is lost.
void mutated_lost_and_repeated_frames_leave_the_result_alone() {
  for (unsigned seed = 0; seed < 20; ++seed) {
    World world;
    std::mt19937 random(seed);
    std::int64_t now = 0;
    const auto carry = [&](Exchange& from, const std::string& name, Exchange& to) {
      while (auto frame = from.next_out(now)) {
        wire::Bytes broken = frame->header;
        broken[random() % broken.size()] ^= static_cast<std::uint8_t>(1 + random() % 255);
        Frame mutated = copy_of(*frame);
        CHECK(to.deliver(now, name, broken.data(), broken.size(), mutated) == FC_DROP);
        if (random() % 10 == 0) {
          continue;
        }
        for (int times = random() % 4 == 0 ? 2 : 1; times > 0; --times) {
          Frame whole = copy_of(*frame);
          to.deliver(now, name, frame->header.data(), frame->header.size(), whole);
        }
      }
    };
    for (int step = 0; step < 10'000 && !world.collector->done(); ++step, now += 500) {
      world.server.tick(now);
      while (auto frame = world.server.next_out(now)) {
        Exchange& site = frame->peer == "north" ? world.north : world.south;
        Frame none;
        if (random() % 10 != 0) {
          site.deliver(now, "server", frame->header.data(), frame->header.size(), none);
        }
      }
      carry(world.north, "north", world.server);
      carry(world.south, "south", world.server);
    }
    world.check_result();
  }
}

void threads_may_use_one_exchange_at_the_same_time() {
  World world;
  std::atomic<bool> stop{false};
  std::thread watcher([&] {
    while (!stop) {
      world.collector->chunks_received();
      world.server.stats();
      world.server.last_heard("north");
      world.server.has_event();
    }
  });
  const auto site = [&](Exchange& exchange, const std::string& name) {
    while (!world.collector->done()) {
      while (auto frame = exchange.next_out(0)) {
        Frame whole = copy_of(*frame);
        world.server.deliver(0, name, frame->header.data(), frame->header.size(), whole);
      }
      std::this_thread::yield();
    }
  };
  std::thread north(site, std::ref(world.north), "north"),
      south(site, std::ref(world.south), "south");
  while (!world.collector->done()) {
    world.server.tick(0);
    while (auto frame = world.server.next_out(0)) {
      Frame none;
      Exchange& target = frame->peer == "north" ? world.north : world.south;
      target.deliver(0, "server", frame->header.data(), frame->header.size(), none);
    }
    std::this_thread::yield();
  }
  north.join();
  south.join();
  stop = true;
  watcher.join();
  world.check_result();
}

void a_file_that_cannot_be_made_is_an_error() {
  bool thrown = false;
  try {
    MappedFile::create("/nonexistent-folder/file", 4096);
  } catch (const Error& error) {
    thrown = error.code() == Errc::kStorage;
  }
  CHECK(thrown);
}

constexpr std::string_view kCut[] = {"trim", "scale"};

void a_rule_gets_a_number_for_each_of_its_options() {
  const Rule& median = find_rule("median");
  Rule rule = median;
  rule.options = kCut;
  rule.with = [](const std::vector<double>& numbers) {
    Rule made = find_rule("median");
    made.traits.least = static_cast<std::size_t>(numbers[0] + 10 * numbers[1]);
    return made;
  };
  const auto refused = [](const Rule& of, const std::map<std::string, double>& options) {
    try {
      rule_with(of, options);
    } catch (const Error& error) {
      return error.code() == Errc::kConfig;
    }
    return false;
  };
  CHECK(rule_with(rule, {{"scale", 2}, {"trim", 3}})->traits.least == 23);
  CHECK(refused(rule, {{"trim", 3}}));
  CHECK(refused(rule, {{"trim", 3}, {"scale", 2}, {"other", 1}}));
  CHECK(refused(median, {{"trim", 3}}));
  CHECK(rule_with(median, {}).get() == &median);
}

}  // namespace

int main() {
  every_level_gives_the_baselines_bits_within_bounds();
  mutated_lost_and_repeated_frames_leave_the_result_alone();
  threads_may_use_one_exchange_at_the_same_time();
  a_file_that_cannot_be_made_is_an_error();
  a_rule_gets_a_number_for_each_of_its_options();
  std::puts("all native checks passed");
}
