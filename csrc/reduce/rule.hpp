// Rule: what combines K updates into one result. This page is the contract; a rule is one source file
// beside it, two lines in families.hpp, and one entry in fedcore/rules/registry.py.
//
// A rule is a constant: a name, a version, its traits, and a function that makes a Combiner for
// given weights. The version changes when the same inputs give other bits. One whose arithmetic is
// Python (python/rules.cpp) has the same contract. A rule may take options, which are numbers by
// name: rule_with() makes the rule that has them.
//
// A Combiner works on one block of elements at a time. It owns its scratch memory, which does not
// grow with the block. One thread uses a Combiner; threads that share a job have one each.
//   - The bytes of the result depend on the inputs, their order and their weights alone: not on how
//     the elements are cut into blocks, on threads, or on the instruction set.
//   - Where traits.symmetric is true, they do not depend on the order either. Elsewhere the caller
//     gives the inputs in canonical order.
//   - Every input value is checked, unless traits.copies is true: a function returns false if a value
//     or a result is NaN or infinite, and `out` is not to be used then.
//   - Integers and booleans are copied from `base`, or from the first input without one.
//   - The result is rounded once to the dtype of the inputs. Where a finisher follows, it gets the
//     result in binary64 instead, before that rounding: combine_wide().
//   - A rule that folds takes one input after the other, too, with sums between them. The bits are
//     those of combine(). The other rules need a block of every input at the same time.
//   - A rule that runs code from outside the core may fail: making a Combiner throws Error{kRule},
//     and combining throws RuleError.
//
// That is a rule of which an element of the result depends on that element of each source alone. A
// rule with views (Rule::views()) sees more: a whole tensor or a group of tensors, sources of other
// layouts than the output's, or what each source's base holds.
//   - For each chunk of the output, see() shows a View of each source (view.hpp): what needs() names
//     of it, decoded and finite. combine_seen() then gives the chunk's elements, in pieces and in
//     order. combine(), combine_wide() and folding are not called.
//   - A chunk of the output may be made more than once, and chunks are made in any order: a result
//     depends on the views of its own chunk alone.
//   - Integers and booleans are copied from the base of the output.
//   - All that a chunk of the output needs is in memory at the same time. The budget is asked before
//     the first chunk is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "format/layout.hpp"

namespace fedcore {

// A rule has failed in a block, or broke its contract there.
class RuleError : public Error {
 public:
  // `element`: of the block, the first that is affected. `trace`: for whoever mends the rule.
  RuleError(const std::string& message, std::size_t element, std::string trace = "")
      : Error(Errc::kRule, message), element_(element), trace_(std::move(trace)) {}
  std::size_t element() const noexcept { return element_; }
  const std::string& trace() const noexcept { return trace_; }

 private:
  std::size_t element_;
  std::string trace_;
};

class View;

// What an element of the result depends on, of each source: that element, its tensor, or a group of
// tensors that the rule knows, such as the two factors of an adapter.
enum class Unit : std::uint8_t { kElement, kTensor, kGroup };

struct Traits {
  bool weighted;      // weights change the result
  bool symmetric;     // the order of the inputs does not change the result
  bool folds;         // it can take one input after the other, and keep sums between them
  std::size_t least;  // sources that it needs at least
  std::size_t most = std::numeric_limits<std::size_t>::max();  // and that it takes at most
  bool copies = false;  // the result is the one source, whatever its values are: none is checked
  Unit unit = Unit::kElement;
  // What each source adds is its difference to its own base, which may be another version than that
  // of the others. Where false, sources have one base, and moving it moves the result along.
  bool relative = false;
  bool real_weights = false;  // any real weights; else positive ones
};

// A rule defines the functions of its kind. Those that are not its own throw Error{kConfig}.
class Combiner {
 public:
  virtual ~Combiner() = default;
  // Combines one block of `nbytes` of one dtype on the CPU. `inputs` holds a pointer for each
  // weight. No pointer needs alignment. `base` may be nullptr. `out` overlaps no input.
  virtual bool combine(Dtype dtype, const void* const* inputs, const void* base, void* out,
                       std::uint64_t nbytes);

  // The same for `count` elements of a float dtype, before the rounding to the dtype: `out` gets
  // binary64 numbers. `out` needs the alignment of a double.
  virtual bool combine_wide(Dtype dtype, const void* const* inputs, double* out, std::size_t count);

  // combine() for `count` elements of a float dtype on the device in use: FC_MEAN_DECLINED where
  // there is none, or none that knows the rule. `encodings` (kernels/device.h) says how each input
  // holds its elements; nullptr: as they are.
  virtual int combine_on_device(Dtype dtype, const void* const* inputs,
                                const std::uint8_t* encodings, const void* base, void* out,
                                std::size_t count) noexcept;

  // Where traits.folds is true. fold() adds input `source`, of finite values, to the sums: first
  // input 0, and so on in order. An input may be added in pieces of kernels::kPiece elements and a
  // rest. finish_fold() writes what combine() writes, finish_fold_wide() what combine_wide() does.
  virtual void fold(Dtype dtype, std::size_t source, const void* input, double* sums,
                    std::uint64_t nbytes);
  virtual void finish_fold(Dtype dtype, const double* sums, void* out, std::uint64_t nbytes);
  virtual void finish_fold_wide(Dtype dtype, const double* sums, double* out, std::size_t count);

  // Where Rule::views() is true. see(): `range` of the output is made from these views, one for each
  // weight, which are valid until the next call. combine_seen(): `count` elements of a float dtype
  // from flat byte `offset` of the output on, in binary64; `base` points at those of the output's
  // base, all of whose flat bytes lie around it, or is nullptr. The caller checks the numbers, and limits and rounds each once.
  virtual void see(const Layout& out, Range range, std::span<const View> views);
  virtual void combine_seen(Dtype dtype, std::uint64_t offset, const void* base, double* out,
                            std::size_t count);
};

struct Rule {
  std::string_view name;
  unsigned version;
  Traits traits;
  // Bytes of scratch memory of one Combiner for k sources.
  std::function<std::size_t(std::size_t k)> scratch;
  // `weights` passed check_weights().
  std::function<std::unique_ptr<Combiner>(const std::vector<double>& weights)> make;
  // Sums that each element of a dtype has between two inputs of a fold; null where traits.folds is
  // false.
  std::size_t (*sums_per_element)(Dtype dtype) noexcept = nullptr;
  // Whether a chunk may take so long that other work is to be done between two of them.
  bool slow = false;
  // Which ranges of source k a range of the output depends on, by the layouts of the output and of
  // the sources. Throws Error{kLayout} for layouts that do not go together. Null: the same range, or
  // the tensors that it touches, of sources of the output's layout.
  std::function<std::vector<Range>(const Layout& out, Range range,
                                   const std::vector<const Layout*>& sources, std::size_t k)>
      needs = nullptr;
  // The names of its options, and the rule that has a number for each, in this order: it has the same
  // name and version; traits, scratch and combiners may depend on the numbers. Throws Error{kConfig}
  // for numbers that it does not take. A rule with options makes no combiner before it has them.
  std::span<const std::string_view> options = {};
  Rule (*with)(const std::vector<double>& numbers) = nullptr;
  // What make() makes of weights first; null: nothing.
  std::function<std::vector<double>(const std::vector<double>& weights)> weigh = nullptr;

  bool views() const noexcept {
    return traits.unit != Unit::kElement || traits.relative || needs != nullptr;
  }
  // Whether a chunk of the output depends on the same chunk of each source and on no other.
  bool chunkwise() const noexcept { return traits.unit == Unit::kElement && needs == nullptr; }
};

// What a rule with views or other layouts needs of source k: Rule::needs, or what stands for null.
std::vector<Range> needed(const Rule& rule, const Layout& out, Range range,
                          const std::vector<const Layout*>& sources, std::size_t k);

// The nearest weight that a rule takes: 24 significant bits, so that its product with an element of
// 4 or 2 bytes is exact in binary64. Ties go to even.
double effective_weight(double weight) noexcept;

// Throws Error{kWeight} for a weight that is not finite, has more than 24 significant bits, or lies
// outside of 2^-64 to 2^64; for one that is not positive, where the rule does not take real weights.
// As below for their number.
void check_weights(const Rule& rule, const std::vector<double>& weights);

// Throws Error{kWeight} unless kernels::is_weight() holds for every weight and there is one at
// least, and Error{kConfig} where the rule needs more sources or takes fewer.
void check_weights(const Rule& rule, const std::vector<std::uint64_t>& weights);

// The rules that a user may choose, in the order in which documentation names them.
const std::vector<const Rule*>& rules();

// One of rules(), or "copy". Throws Error{kConfig} that names rules().
const Rule& find_rule(std::string_view name);

// One of rules() for whoever shares rules that it owns, too.
inline std::shared_ptr<const Rule> known_rule(const Rule& rule) {
  return {std::shared_ptr<void>(), &rule};
}

// The rule with a number for each of its options. Throws Error{kConfig} that names an option which is
// missing or which the rule does not have, and what Rule::with throws.
std::shared_ptr<const Rule> rule_with(const Rule& rule,
                                      const std::map<std::string, double>& options);

}  // namespace fedcore
