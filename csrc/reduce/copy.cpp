// The copy of one source: what a site's download is.
//
// The result has the source's bytes, whatever they hold: NaN is copied, too, and so are integers and
// booleans, base or not. Whoever collects may therefore pass a chunk on as it came.
#include <algorithm>
#include <cstring>

#include "codec/element.hpp"
#include "reduce/families.hpp"

namespace fedcore {
namespace {

class Copy final : public Combiner {
 public:
  bool combine(Dtype, const void* const* inputs, const void*, void* out,
               std::uint64_t nbytes) override {
    std::memcpy(out, inputs[0], nbytes);
    return true;
  }

  bool combine_wide(Dtype dtype, const void* const* inputs, double* out,
                    std::size_t count) override {
    const auto* const from = static_cast<const std::uint8_t*>(inputs[0]);
    std::uint64_t bad = 0;
    with_float(dtype, [&]<typename T>(T, double) {
      for (std::size_t i = 0; i < count; ++i) {
        out[i] = T::read(from, i);
        bad |= arith::non_finite(out[i]);
      }
    });
    return bad == 0;  // a finisher takes numbers alone
  }
};

std::size_t scratch(std::size_t) { return 0; }

std::unique_ptr<Combiner> make(const std::vector<double>&) { return std::make_unique<Copy>(); }

}  // namespace

const Rule kCopy{.name = "copy",
                 .version = 1,
                 .traits = {.weighted = false,
                            .symmetric = true,
                            .folds = false,
                            .least = 1,
                            .most = 1,
                            .copies = true},
                 .scratch = &scratch,
                 .make = &make};

}  // namespace fedcore
