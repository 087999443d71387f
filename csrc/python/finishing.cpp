// The class Finisher of the module fedcore._core.

#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "python/bindings.hpp"
#include "reduce/families.hpp"
#include "reduce/finish.hpp"

namespace fedcore {
namespace {

// Of each chunk of a state, by its name.
using PyChecksums = std::map<std::string, std::vector<std::uint32_t>>;

std::shared_ptr<Finisher> make_finisher(const PyLayout& layout, const std::string& name,
                                        const std::map<std::string, double>& options,
                                        const std::set<std::string>& plain, const PyStates& before,
                                        const PyChecksums& checksums, std::optional<double> ema) {
  const FinisherKind& kind = find_finisher(name);
  std::vector<double> values;
  for (const std::string_view option : kind.options) {
    if (const auto found = options.find(std::string(option)); found != options.end()) {
      values.push_back(found->second);
    }
  }
  if (values.size() != options.size()) {
    values.clear();  // one is unknown: refused as too few
  }
  std::map<std::string, StatePlace> places = to_states(before);
  for (const auto& [state, crcs] : checksums) {
    if (const auto found = places.find(state); found != places.end()) {
      found->second.crcs = crcs;
    }
  }
  return std::make_shared<Finisher>(layout, kind, std::move(values), plain, places, ema);
}

// Reduces whole inputs by the mean, chunk by chunk, as a collector does; for tests.
void finish_mean(const Finisher& finisher, const std::vector<py::buffer>& inputs,
                 const std::vector<py::int_>& weights, const py::buffer& base,
                 const py::buffer& out, const PyStates& after) {
  const Layout& layout = finisher.layout();
  const Bytes from(base), to(out, true);
  std::vector<std::unique_ptr<Bytes>> held;
  for (const py::buffer& input : inputs) {
    held.push_back(std::make_unique<Bytes>(input));
    if (held.back()->size() != layout.total_bytes()) {
      throw Error(Errc::kLayout, "an input does not have the bytes of the layout");
    }
  }
  const std::vector<StatePlace> places = finisher.check_after(to_states(after));
  FinishedChunk chunk(finisher, places);
  const std::vector<std::uint64_t> checked = to_weights(weights);
  Reducer reducer(kMean, {checked.begin(), checked.end()}, &chunk);
  if (reducer.sources() != held.size() || from.size() != layout.total_bytes() ||
      to.size() != layout.total_bytes()) {
    throw Error(Errc::kLayout, "base and output must have the bytes of the layout");
  }
  const py::gil_scoped_release unlocked;
  for (std::uint64_t index = 0; index < layout.chunk_count(); ++index) {
    const Range range = layout.chunk_range(index);
    std::vector<Body> bodies;
    for (const auto& input : held) {
      bodies.push_back({input->data() + range.offset, range.nbytes});
    }
    chunk.begin(range);
    if (reducer.reduce(layout, range, bodies.data(), from.data() + range.offset,
                       to.data() + range.offset)) {
      throw Error(Errc::kNonFinite, "NaN or infinity in an input");
    }
    chunk.write();
  }
}

}  // namespace

std::map<std::string, StatePlace> to_states(const PyStates& states) {
  std::map<std::string, StatePlace> places;
  for (const auto& [name, place] : states) {
    places[name] = {std::get<0>(place)->share(), std::get<1>(place)};
  }
  return places;
}

void bind_finishing(py::module_& m) {
  py::class_<Finisher, std::shared_ptr<Finisher>>(
      m, "Finisher",
      "Turns combined values into the elements of the next version, with states: a server "
      "optimizer for one layout, and the states of one version.")
      .def(py::init(&make_finisher), py::arg("layout"), py::arg("name"), py::arg("options"),
           py::arg("plain") = std::set<std::string>(), py::arg("before") = PyStates(),
           py::arg("checksums") = PyChecksums(), py::arg("ema") = std::nullopt)
      .def_property_readonly(
          "states",
          [](const Finisher& finisher) {
            py::list states;
            for (const FinisherState& state : finisher.states()) {
              states.append(py::make_tuple(state.name, std::make_shared<Layout>(*state.layout)));
            }
            return states;
          },
          "(name, layout) of each state.")
      .def_property_readonly("chunk_bytes", &Finisher::chunk_bytes,
                             "Bytes of the states of one chunk, at most.");
  m.def(
      "round_state",
      [](const FileHandle& state, std::uint64_t offset, const FileHandle& model, std::uint64_t to,
         const std::string& dtype, std::uint64_t count) {
        py::gil_scoped_release unlocked;
        round_state(*state.share(), offset, *model.share(), to, parse_dtype(dtype), count);
      },
      py::arg("state"), py::arg("offset"), py::arg("model"), py::arg("to"), py::arg("dtype"),
      py::arg("count"),
      "Write elements of a state to a model's file, rounded to the model's dtype.");
  m.def(
      "finishers",
      [] {
        py::list out;
        for (const FinisherKind* const kind : finisher_kinds()) {
          const std::vector<std::string_view> states(kind->states.begin(), kind->states.end());
          const std::vector<std::string_view> options(kind->options.begin(), kind->options.end());
          out.append(py::make_tuple(kind->name, kind->version, states, options));
        }
        return out;
      },
      "The kinds of finishers of the core: (name, version, states, options).");
  m.def("finish_mean", &finish_mean, py::arg("finisher"), py::arg("inputs"), py::arg("weights"),
        py::arg("base"), py::arg("out"), py::arg("after"),
        "Finish the mean of whole buffers, chunk by chunk as a collector does; for tests.");
}

}  // namespace fedcore
