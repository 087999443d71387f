// A process that is killed with SIGKILL after each chunk that it received, and one that goes on
// with its files: in one address space, under the sanitizers.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/crc32c.hpp"
#include "check.hpp"
#include "collect/collector.hpp"

using namespace fedcore;

namespace {

constexpr std::uint64_t kChunk = 4096;
constexpr std::uint64_t kChunks = 37;
constexpr std::uint64_t kElements = kChunk / 4 * kChunks - 5;
constexpr std::uint64_t kWindow = 3;

std::string folder;

wire::SetId set_of(std::size_t source) {
  wire::SetId id{};
  id[0] = static_cast<std::uint8_t>(source + 1);
  return id;
}

float value_of(std::size_t source, std::uint64_t element) {
  return static_cast<float>(element % 1000) * static_cast<float>(source + 1);
}

struct Server {
  std::shared_ptr<Layout> layout = std::make_shared<Layout>(
      std::vector<TensorSpec>{{"w", Dtype::kF32, {static_cast<std::int64_t>(kElements)}}}, kChunk);
  std::shared_ptr<MappedFile> out;
  std::unique_ptr<Collector> collector;
  std::int64_t now = 0;
  std::uint64_t delivered = 0;
  std::vector<GetRequest> waiting;

  Server() {
    const std::string path = folder + "/out";
    auto record = Record::open(folder + "/record");
    if (record) {
      out = MappedFile::open(path, true);
    } else {
      ::unlink(path.c_str());
      out = MappedFile::create(path, layout->total_bytes());
      record = Record::create(folder + "/record", {}, {{"a", set_of(0), 1}, {"b", set_of(1), 3}},
                              kChunks);
    }
    CollectorOptions options{2 * kWindow * kChunk};
    options.spill = std::make_shared<Spill>(folder + "/spill", kChunk, 0, 8 * kChunk);
    options.spill_after_ms = 0;
    collector = std::make_unique<Collector>(
        layout, std::vector<Source>{{"a", set_of(0), 1}, {"b", set_of(1), 3}}, Place{out, 0},
        Place{}, options, std::move(record));
  }

  bool deliver(std::size_t source, std::uint64_t index) {
    const Range range = layout->chunk_range(index);
    auto* memory = static_cast<float*>(std::malloc(range.nbytes));
    for (std::uint64_t i = 0; i < range.nbytes / 4; ++i) {
      memory[i] = value_of(source, range.offset / 4 + i);
    }
    wire::Header header;
    header.kind = wire::Kind::kChunk;
    header.set = set_of(source);
    header.index = index;
    header.length = static_cast<std::uint32_t>(range.nbytes);
    header.body_crc = crc32c(memory, range.nbytes);
    Frame frame(memory, range.nbytes, memory, std::free);
    ++delivered;
    return collector->on_chunk(source, header, frame, now);
  }

  // Answers requests of the sources below `awake`, a chunk of each in turn, up to so many chunks;
  // returns how many.
  std::uint64_t run(std::size_t awake, std::uint64_t chunks) {
    const std::uint64_t before = delivered;
    for (int idle = 0; idle < 4 && !collector->done(); ++idle) {
      collector->tick(++now);
      while (const auto request = collector->next_request(now)) {
        waiting.push_back(*request);
      }
      for (GetRequest& request : waiting) {
        if (request.source >= awake || request.count == 0) {
          continue;
        }
        if (delivered - before == chunks) {
          return chunks;
        }
        idle = -1;
        --request.count;
        CHECK(deliver(request.source, request.first++));
      }
    }
    return delivered - before;
  }

  void check() const {
    CHECK(collector->done());
    const auto* values = reinterpret_cast<const float*>(out->data());
    for (std::uint64_t i = 0; i < kElements; ++i) {
      const double mean = (value_of(0, i) + 3.0 * value_of(1, i)) / 4.0;
      CHECK(values[i] == static_cast<float>(mean));
    }
    for (std::uint64_t index = 0; index < kChunks; ++index) {
      const Range range = layout->chunk_range(index);
      CHECK(collector->checksums()[index] == crc32c(out->data() + range.offset, range.nbytes));
    }
  }
};

// Collects up to so many chunks in a process of its own, which then kills itself. The first source
// may come alone for a while, so that it is spilled. Returns how many chunks came.
std::uint64_t killed_after(std::uint64_t chunks, std::uint64_t alone) {
  int ends[2];
  CHECK(::pipe(ends) == 0);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    Server server;
    const std::uint64_t first = server.run(1, alone);
    server.run(2, chunks - std::min(chunks, first));
    CHECK(::write(ends[1], &server.delivered, sizeof server.delivered) == sizeof server.delivered);
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  std::uint64_t came = 0;
  CHECK(::read(ends[0], &came, sizeof came) == sizeof came);
  ::close(ends[0]);
  ::close(ends[1]);
  return came;
}

void remove_files() {
  for (const char* name : {"/out", "/record", "/spill", "/spill-index"}) {
    ::unlink((folder + name).c_str());
  }
}

void a_killed_process_loses_at_most_a_window_of_each_source() {
  for (std::uint64_t chunks = 0; chunks <= 2 * kChunks; ++chunks) {
    for (const std::uint64_t alone : {std::uint64_t{0}, chunks / 2, chunks}) {
      const std::uint64_t before = killed_after(chunks, alone);
      Server server;
      const std::uint64_t again = server.run(2, 10 * kChunks);
      server.check();
      CHECK(before + again <= 2 * kChunks + 2 * kWindow);
      remove_files();
    }
  }
}

void a_process_killed_again_and_again_gets_to_the_end() {
  for (int times = 0; times < 30; ++times) {
    killed_after(2 * kWindow + 1, times % 3 == 0 ? 2 * kWindow : 0);
  }
  Server server;
  CHECK(server.run(2, 10 * kChunks) <= 2 * kWindow);
  server.check();
  remove_files();
}

void a_lost_source_takes_its_chunks_out_of_the_record() {
  Server server;
  server.run(2, kChunks);
  const auto before = Record::open(folder + "/record");
  CHECK(before && before->at(0) && before->sources().size() == 2);
  server.collector->drop(1);
  const auto after = Record::open(folder + "/record");
  CHECK(after && after->sources().size() == 1 && after->sources()[0].site == "a");
  for (std::uint64_t index = 0; index < kChunks; ++index) {
    CHECK(!after->at(index));
  }
  server.run(1, 10 * kChunks);
  CHECK(server.collector->done());
  for (std::uint64_t index = 0; index < kChunks; ++index) {
    CHECK(after->at(index) == server.collector->checksums()[index]);
  }
  remove_files();
}

}  // namespace

int main() {
  char made[] = "/tmp/fedcore-resume-XXXXXX";
  CHECK(mkdtemp(made) != nullptr);
  folder = made;
  a_killed_process_loses_at_most_a_window_of_each_source();
  a_process_killed_again_and_again_gets_to_the_end();
  a_lost_source_takes_its_chunks_out_of_the_record();
  ::rmdir(made);
  return 0;
}
