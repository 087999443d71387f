// The class PythonRule of the module fedcore._core: a rule whose arithmetic is Python, by the
// contract of fedcore/rules/contract.py, as a rule of the core.
//
// It gets the elements of a piece of each source in binary64, and gives one number an element. The
// core decodes what comes, checks it and what the rule made of it, and rounds that once. It holds
// the GIL while Python works, so threads take turns; the bits do not depend on their number. What
// Python raises becomes the core's own error here: it must not cross a thread that has no GIL.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/arith.hpp"
#include "kernels/kernels.hpp"
#include "python/bindings.hpp"
#include "reduce/pairs.hpp"
#include "reduce/rule.hpp"
#include "reduce/weigh.hpp"

namespace fedcore {
namespace {

// Elements of a source in a piece: a call into Python is worth some work.
std::size_t piece_elements(std::size_t k) {
  constexpr std::size_t kBytes = 1u << 20, kMost = 64u << 10;
  return std::clamp(kBytes / (k * sizeof(double)) / kernels::kPiece * kernels::kPiece,
                    kernels::kPiece, kMost);
}

// What is kept here, and twice as much again for what Python makes on the way.
std::size_t scratch(std::size_t k) { return 3 * (k + 1) * piece_elements(k) * sizeof(double); }

// Reads n elements as binary64 numbers. Returns false if one is NaN or infinite.
template <typename Format>
bool widen(const void* from, double* to, std::size_t n) {
  std::uint64_t bad = 0;
  for (std::size_t i = 0; i < n; ++i) {
    typename Format::Word word;
    std::memcpy(&word, static_cast<const std::uint8_t*>(from) + i * sizeof word, sizeof word);
    to[i] = Format::decode(word);
    bad |= arith::non_finite(to[i]);
  }
  return bad == 0;
}

// Writes n numbers, each rounded once. Returns the first that is beyond the format's finite numbers,
// or n.
template <typename Format>
std::size_t narrow(const double* from, void* to, std::size_t n) {
  std::size_t beyond = n;
  for (std::size_t i = n; i-- > 0;) {
    beyond = std::abs(from[i]) <= Format::largest() ? beyond : i;
    const auto word = Format::encode(arith::limited<Format>(from[i]));
    std::memcpy(static_cast<std::uint8_t*>(to) + i * sizeof word, &word, sizeof word);
  }
  return beyond;
}

// Calls one of these for the format of a dtype.
template <typename Call>
auto for_format(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::kF64:
      return call(arith::F64());
    case Dtype::kF32:
      return call(arith::F32());
    case Dtype::kF16:
      return call(arith::F16());
    default:
      return call(arith::Bf16());
  }
}

// An object of Python's that is let go of under the GIL, by whatever thread has it last.
using Held = std::shared_ptr<py::object>;

Held hold(py::object object) {
  return {new py::object(std::move(object)), [](py::object* held) {
            const py::gil_scoped_acquire acquire;
            delete held;
          }};
}

// What was raised, in words and with its traceback. It needs the GIL.
RuleError raised(const std::string& before, const py::error_already_set& error,
                 std::size_t element) {
  try {
    const std::string kind = py::str(error.type().attr("__name__"));
    const std::string text = py::str(error.value());
    const py::object trace = error.trace() ? error.trace() : py::none();
    const auto lines = py::module_::import("traceback")
                           .attr("format_exception")(error.type(), error.value(), trace);
    return {before + (text.empty() ? kind : kind + ": " + text), element,
            py::str("").attr("join")(lines).cast<std::string>()};
  } catch (const py::error_already_set&) {  // what was raised can't be shown
    return {before + "it raised an exception that has no text", element};
  }
}

class PythonCombiner final : public Combiner {
 public:
  PythonCombiner(Held combine, std::size_t k)
      : combine_(std::move(combine)),
        k_(k),
        step_(piece_elements(k)),
        values_(k * step_),
        result_(step_) {}

  bool combine(Dtype dtype, const void* const* inputs, const void* base, void* out,
               std::uint64_t nbytes) override {
    if (!is_float(dtype)) {
      std::memcpy(out, base != nullptr ? base : inputs[0], nbytes);
      return true;
    }
    const std::size_t width = item_size(dtype);
    return for_pieces(dtype, inputs, nbytes / width, [&](std::size_t first, std::size_t n) {
      const std::size_t beyond = for_format(dtype, [&](auto format) {
        auto* const to = static_cast<std::uint8_t*>(out) + first * width;
        return narrow<decltype(format)>(result_.data(), to, n);
      });
      if (beyond < n) {
        throw RuleError("it gave a number that is too large for " + std::string(dtype_name(dtype)),
                        first + beyond);
      }
    });
  }

  bool combine_wide(Dtype dtype, const void* const* inputs, double* out,
                    std::size_t count) override {
    return for_pieces(dtype, inputs, count, [&](std::size_t first, std::size_t n) {
      std::copy_n(result_.begin(), n, out + first);
    });
  }

 private:
  // Calls each(first, n) once result_ holds what the rule made of these elements.
  template <typename Each>
  bool for_pieces(Dtype dtype, const void* const* inputs, std::size_t count, const Each& each) {
    const std::size_t width = item_size(dtype);
    for (std::size_t first = 0; first < count; first += step_) {
      const std::size_t n = std::min(step_, count - first);
      for (std::size_t s = 0; s < k_; ++s) {
        const auto* const from = static_cast<const std::uint8_t*>(inputs[s]) + first * width;
        const bool finite = for_format(dtype, [&](auto format) {
          return widen<decltype(format)>(from, values_.data() + s * n, n);
        });
        if (!finite) {
          return false;
        }
      }
      call(first, n);
      each(first, n);
    }
    return true;
  }

  // Has the rule combine the elements from `first` on; throws RuleError.
  void call(std::size_t first, std::size_t n) {
    std::fill_n(result_.begin(), n, std::nan(""));  // what the rule leaves out is found below
    {
      const py::gil_scoped_acquire acquire;
      const auto rows = static_cast<py::ssize_t>(k_), columns = static_cast<py::ssize_t>(n);
      constexpr py::ssize_t kSize = sizeof(double);
      const auto values = py::memoryview::from_buffer(static_cast<const double*>(values_.data()),
                                                      {rows, columns}, {columns * kSize, kSize});
      const auto out = py::memoryview::from_buffer(result_.data(), {columns}, {kSize});
      try {
        (*combine_)(values, out);
      } catch (const py::error_already_set& error) {
        throw raised("", error, first);
      }
    }
    for (std::size_t i = 0; i < n; ++i) {
      if (arith::non_finite(result_[i]) != 0) {
        throw RuleError("it left the element out, or gave NaN or infinity", first + i);
      }
    }
  }

  const Held combine_;
  const std::size_t k_;
  const std::size_t step_;      // elements of a source in a piece
  std::vector<double> values_;  // a piece of each source, source after source
  std::vector<double> result_;
};

// What the class PythonRule holds. `rule` has its name here.
struct PythonRule {
  std::string name;
  Rule rule;
};

// What the class WeighedRule holds.
struct WeighedRule {
  std::shared_ptr<const Rule> rule;
};

std::shared_ptr<PythonRule> make_rule(const std::string& name, unsigned version, bool weighted,
                                      bool symmetric, std::size_t least, py::object make) {
  auto made = std::make_shared<PythonRule>();
  made->name = name;
  const auto combiner = [name, held = hold(std::move(make))](const std::vector<double>& weights) {
    const py::gil_scoped_acquire acquire;
    try {
      return std::unique_ptr<Combiner>(
          std::make_unique<PythonCombiner>(hold((*held)(weights)), weights.size()));
    } catch (const py::error_already_set& error) {
      throw raised("the rule '" + name + "' can't be made: ", error, 0);
    }
  };
  made->rule = {made->name, version, {weighted, symmetric, false, least}, &scratch, combiner,
                nullptr,    true};
  return made;
}

}  // namespace

std::shared_ptr<const Rule> to_rule(const py::object& rule) {
  if (py::isinstance<py::str>(rule)) {
    return rule_with(find_rule(rule.cast<std::string>()), {});
  }
  if (py::isinstance<py::tuple>(rule)) {
    const auto [name, options] = rule.cast<std::pair<std::string, std::map<std::string, double>>>();
    return rule_with(find_rule(name), options);
  }
  if (py::isinstance<WeighedRule>(rule)) {
    return rule.cast<std::shared_ptr<WeighedRule>>()->rule;
  }
  if (auto lora = lora_rule_of(rule)) {
    return lora;
  }
  const auto held = rule.cast<std::shared_ptr<PythonRule>>();
  return {held, &held->rule};
}

namespace {

// A tensor's dtype, its bytes, and where it lies in each input.
using PyPlaces = std::tuple<std::string, std::uint64_t, std::vector<std::uint64_t>>;

py::object py_pair_distances(const std::vector<FileHandle*>& inputs,
                             const std::vector<PyPlaces>& tensors, unsigned threads,
                             const std::function<void(std::uint64_t)>& progress) {
  std::vector<std::shared_ptr<MappedFile>> files;
  for (const FileHandle* input : inputs) {
    files.push_back(input->share());
  }
  std::vector<FileTensor> jobs;
  for (const auto& [dtype, nbytes, offsets] : tensors) {
    jobs.push_back({parse_dtype(dtype), nbytes, offsets, 0});
  }
  const auto report = [&](std::uint64_t bytes) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
    progress(bytes);
  };
  Distances found;
  {
    const py::gil_scoped_release release;
    found = pair_distances(files, jobs, threads, report);
    for (const auto& file : files) {
      file->check_whole();
    }
  }
  const auto& bad = found.bad;
  return py::make_tuple(found.squares,
                        bad ? py::object(py::make_tuple(bad->source, bad->tensor, bad->element))
                            : py::object(py::none()));
}

}  // namespace

void bind_rules(py::module_& m) {
  py::class_<PythonRule, std::shared_ptr<PythonRule>>(
      m, "PythonRule",
      "A rule whose arithmetic is Python: make(weights) returns combine(values, out), where values "
      "holds a row of binary64 numbers for each source, and out one number an element.")
      .def(py::init(&make_rule), py::arg("name"), py::arg("version"), py::arg("weighted"),
           py::arg("symmetric"), py::arg("least"), py::arg("make"));
  py::class_<WeighedRule, std::shared_ptr<WeighedRule>>(
      m, "WeighedRule",
      "A rule whose sources weigh the same, or none of which weighs more than `max_share` "
      "millionths "
      "of all.")
      .def(py::init([](const py::object& rule, bool equal, std::uint32_t max_share) {
             return WeighedRule{weighed(to_rule(rule), {equal, max_share})};
           }),
           py::arg("rule"), py::arg("equal"), py::arg("max_share"));
  m.def(
      "weigh",
      [](const std::vector<double>& examples, bool equal, std::uint32_t max_share) {
        return weigh({equal, max_share}, examples);
      },
      py::arg("examples"), py::arg("equal"), py::arg("max_share"),
      "The effective weights of sources in a WeighedRule.");
  m.def(
      "pair_distances", &py_pair_distances, py::arg("inputs"), py::arg("tensors"),
      py::arg("threads"), py::arg("progress"),
      "The squared distances of the pairs (0, 1), (0, 2), ... of mapped files: tensors = [(dtype, "
      "nbytes, input offsets)]. Returns them, and None or (input, tensor, element) of the first "
      "non-finite value.");
}

}  // namespace fedcore
