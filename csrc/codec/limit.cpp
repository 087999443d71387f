// The stage "limit": no element changes by more than the option `most`, before the encoding rounds.

#include <cstddef>
#include <string>
#include <string_view>

#include "base/error.hpp"
#include "codec/stage_kinds.hpp"

namespace fedcore {
namespace {

class Limit : public Stage {
 public:
  explicit Limit(float most) : most_(most) {}

  void apply(const Run& part, float* differences) const override {
    const std::size_t count = part.nbytes / item_size(part.dtype);
    for (std::size_t i = 0; i < count; ++i) {
      const float value = differences[i] > most_ ? most_ : differences[i];
      differences[i] = value < -most_ ? -most_ : value;
    }
  }

 private:
  float most_;
};

std::shared_ptr<const Stage> make_limit(const double* options) {
  const auto most = static_cast<float>(options[0]);
  if (!(most > 0) || most > 3.0e38f) {
    throw Error(Errc::kConfig,
                "limit is " + std::to_string(options[0]) + ": expected a positive, finite number");
  }
  return std::make_shared<Limit>(most);
}

constexpr std::string_view kOptions[] = {"most"};

}  // namespace

const StageKind kLimit{"limit", kOptions, make_limit};

}  // namespace fedcore
