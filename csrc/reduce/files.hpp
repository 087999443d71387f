// Whole files combined by a rule, with the kernels that average chunks.
//
// Owns nothing after the call: its threads are joined before it returns or throws. The result does
// not depend on their number. Cost: one pass over the files; pages that are done are released, so
// that memory does not grow with the files.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/mapped_file.hpp"
#include "format/layout.hpp"
#include "reduce/rule.hpp"

namespace fedcore {

// One tensor of a file-to-file reduction: where it lies in each input and in the output.
struct FileTensor {
  Dtype dtype;
  std::uint64_t nbytes;
  std::vector<std::uint64_t> input_offsets;
  std::uint64_t out_offset;
};

struct FileBadValue {
  std::size_t source;
  std::size_t tensor;
  std::uint64_t element;
};

// A rule has failed: in which tensor, and at which of its elements.
class FileRuleError : public RuleError {
 public:
  FileRuleError(const RuleError& error, std::size_t tensor, std::uint64_t element)
      : RuleError(error.what(), static_cast<std::size_t>(element), error.trace()),
        tensor_(tensor) {}
  std::size_t tensor() const noexcept { return tensor_; }

 private:
  std::size_t tensor_;
};

// Combines tensors of `inputs` into `out` by `rule` with `threads` workers, block by block. `progress` runs
// on the calling thread with the bytes done so far, about 20 times a second and once at the end;
// what it throws stops the work. Returns the first non-finite value (lowest tensor, element,
// source), or nothing. Integers and booleans are copied from the first input. Throws FileRuleError.
std::optional<FileBadValue> reduce_files(const std::vector<std::shared_ptr<MappedFile>>& inputs,
                                         const std::vector<std::uint64_t>& weights,
                                         const std::vector<FileTensor>& tensors,
                                         const std::shared_ptr<MappedFile>& out, const Rule& rule,
                                         unsigned threads,
                                         const std::function<void(std::uint64_t)>& progress);

}  // namespace fedcore
