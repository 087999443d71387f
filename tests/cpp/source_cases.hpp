// Sites of own layouts, bases and encodings, and what the rules of hard_rules.hpp make of them, computed from
// whole models.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/crc32c.hpp"
#include "base/mapped_file.hpp"
#include "check.hpp"
#include "codec/codec.hpp"
#include "codec/element.hpp"
#include "collect/collector.hpp"
#include "hard_rules.hpp"

namespace fedcore {

inline constexpr std::uint64_t kChunk = 4096;
inline constexpr std::int64_t kRows = 500, kColumns = 700, kRoom = 6;
inline constexpr const char* kLayers[] = {"a", "b", "c", "d"};
inline constexpr double kWeights[] = {0.375, 3.0, 1.0 / 1024};

using LayoutPtr = std::shared_ptr<const Layout>;

struct Site {
  LayoutPtr layout;
  std::shared_ptr<MappedFile> base;
  std::vector<std::uint32_t> base_crcs;
  std::vector<std::vector<std::uint8_t>> bodies;
  std::vector<std::uint8_t> encodings;
  std::vector<std::uint8_t> flat;  // what the bodies stand for
};

struct Case {
  Rule rule;
  Encoding encoding;
  LayoutPtr out;
  std::shared_ptr<MappedFile> base;
  std::vector<Site> sites;
  // The output of the sources of these numbers, computed from whole models.
  std::function<std::vector<std::uint8_t>(const Case&, const std::vector<std::size_t>&)> expected;
};

inline std::shared_ptr<MappedFile> random_model(const Layout& layout, unsigned seed, double size) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> part(-size, size);
  auto file = MappedFile::anonymous(layout.total_bytes());
  for (const Run& run : layout.runs({0, layout.total_bytes()})) {
    std::uint8_t* const at = file->data() + run.offset;
    if (!is_float(run.dtype)) {
      std::fill_n(at, run.nbytes, static_cast<std::uint8_t>(seed));
      continue;
    }
    with_float(run.dtype, [&]<typename T>(T, double limit) {
      for (std::size_t i = 0; i < run.nbytes / item_size(run.dtype); ++i) {
        T::write(at, i, part(random), limit);
      }
    });
  }
  return file;
}

inline std::vector<std::uint32_t> crcs_of(const Layout& layout, const MappedFile& file) {
  std::vector<std::uint32_t> crcs;
  for (std::uint64_t i = 0; i < layout.chunk_count(); ++i) {
    const Range range = layout.chunk_range(i);
    crcs.push_back(crc32c(file.data() + range.offset, range.nbytes));
  }
  return crcs;
}

inline Site make_site(LayoutPtr layout, Encoding encoding, unsigned seed) {
  Site site{std::move(layout), nullptr, {}, {}, {}, {}};
  site.base = random_model(*site.layout, 100 + seed, 1);
  site.base_crcs = crcs_of(*site.layout, *site.base);
  const auto values = random_model(*site.layout, seed, 2);
  site.flat.resize(site.layout->total_bytes());
  Codec codec(site.layout, {.encoding = encoding});
  for (std::uint64_t i = 0; i < site.layout->chunk_count(); ++i) {
    const std::uint64_t at = site.layout->chunk_range(i).offset;
    site.bodies.emplace_back();
    site.encodings.push_back(
        codec.encode(i, values->data() + at, site.base->data() + at, nullptr, site.bodies.back()));
    CHECK(codec.decode(i, site.encodings[i], site.bodies[i].data(), site.bodies[i].size(),
                       site.base->data() + at, site.flat.data() + at) == nullptr);
  }
  return site;
}

inline LayoutPtr adapters(std::int64_t first, std::int64_t second) {
  std::vector<TensorSpec> specs{{"steps", Dtype::kI64, {3}}};
  std::int64_t rank = first;
  for (const std::string layer : kLayers) {
    specs.push_back({layer + ".A", Dtype::kF32, {rank, kColumns}});
    specs.push_back({layer + ".B", Dtype::kF32, {kRows, rank}});
    rank = rank == first ? second : first;
  }
  return std::make_shared<Layout>(std::move(specs), kChunk);
}

inline const float* factor(const Layout& layout, const std::uint8_t* flat,
                           const std::string& name) {
  return reinterpret_cast<const float*>(flat + tensor_of(layout, name).offset);
}

inline std::vector<std::uint8_t> joined(const Case& c, const std::vector<std::size_t>& order) {
  std::vector<std::uint8_t> out(c.out->total_bytes());
  const Tensor& steps = tensor_of(*c.out, "steps");
  std::memcpy(out.data() + steps.offset, c.base->data() + steps.offset, steps.nbytes);
  for (const std::string layer : kLayers) {
    auto* const a = const_cast<float*>(factor(*c.out, out.data(), layer + ".A"));
    auto* const b = const_cast<float*>(factor(*c.out, out.data(), layer + ".B"));
    std::int64_t rank = 0;
    for (const std::size_t k : order) {
      const Site& site = c.sites[k];
      const std::int64_t own = tensor_of(*site.layout, layer + ".A").shape[0];
      const float* const from_a = factor(*site.layout, site.flat.data(), layer + ".A");
      const float* const from_b = factor(*site.layout, site.flat.data(), layer + ".B");
      double most = 0;
      for (std::int64_t i = 0; i < own * kColumns; ++i) {
        most = std::max(most, std::abs(static_cast<double>(from_a[i])));
      }
      double power = 1;
      for (; power <= most; power *= 2) {
      }
      for (; power / 2 > most; power /= 2) {
      }
      for (std::int64_t i = 0; i < own * kColumns; ++i) {
        a[rank * kColumns + i] = static_cast<float>(from_a[i] / power);
      }
      for (std::int64_t i = 0; i < kRows * own; ++i) {
        b[i / own * kRoom + rank + i % own] =
            static_cast<float>(kWeights[k] * static_cast<double>(from_b[i]) * power);
      }
      rank += own;
    }
  }
  return out;
}

inline std::vector<std::uint8_t> moved(const Case& c, const std::vector<std::size_t>& order) {
  std::vector<std::uint8_t> out(c.base->data(), c.base->data() + c.base->size());
  for (const Tensor& tensor : c.out->tensors()) {
    if (!is_float(tensor.dtype)) {
      continue;
    }
    with_float(tensor.dtype, [&]<typename T>(T, double limit) {
      for (std::size_t i = 0; i < tensor.nbytes / item_size(tensor.dtype); ++i) {
        double step = 0;
        for (const std::size_t k : order) {
          step += kWeights[k] * (T::read(c.sites[k].flat.data() + tensor.offset, i) -
                                 T::read(c.sites[k].base->data() + tensor.offset, i));
        }
        T::write(out.data() + tensor.offset, i, step + T::read(c.base->data() + tensor.offset, i),
                 limit);
      }
    });
  }
  return out;
}

template <typename Made>
inline std::unique_ptr<Combiner> make(const std::vector<double>& weights) {
  return std::make_unique<Made>(weights);
}

inline std::size_t no_scratch(std::size_t) { return 0; }

inline Case factors_case(Encoding encoding) {
  Case c{{.name = "joined",
          .version = 1,
          .traits = {.weighted = true,
                     .symmetric = false,
                     .folds = false,
                     .least = 1,
                     .unit = Unit::kGroup,
                     .real_weights = true},
          .scratch = &no_scratch,
          .make = &make<Joined>,
          .needs = &factors},
         encoding,
         adapters(kRoom, kRoom),
         nullptr,
         {},
         &joined};
  c.base = random_model(*c.out, 9, 1);
  c.sites = {make_site(adapters(2, 1), encoding, 1), make_site(adapters(3, 2), encoding, 2),
             make_site(adapters(1, 3), encoding, 3)};
  return c;
}

inline Case bases_case(Encoding encoding) {
  const auto layout = std::make_shared<Layout>(std::vector<TensorSpec>{{"d", Dtype::kF64, {700}},
                                                                       {"w", Dtype::kF32, {9, 500}},
                                                                       {"h", Dtype::kBF16, {3001}},
                                                                       {"g", Dtype::kF16, {999}},
                                                                       {"steps", Dtype::kI32, {5}}},
                                               kChunk);
  Case c{{.name = "relative",
          .version = 1,
          .traits = {.weighted = true,
                     .symmetric = false,
                     .folds = false,
                     .least = 1,
                     .relative = true,
                     .real_weights = true},
          .scratch = &no_scratch,
          .make = &make<Relative>},
         encoding,
         layout,
         nullptr,
         {},
         &moved};
  c.base = random_model(*layout, 9, 1);
  c.sites = {make_site(layout, encoding, 1), make_site(layout, encoding, 2),
             make_site(layout, encoding, 3)};
  return c;
}

inline std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Encoding encoding :
       {Encoding::kRaw, Encoding::kF16, Encoding::kInt8, Encoding::kNf4}) {
    all.push_back(factors_case(encoding));
    all.push_back(bases_case(encoding));
  }
  return all;
}

inline wire::SetId set_of(std::size_t site) {
  wire::SetId id{};
  id[0] = static_cast<std::uint8_t>(site + 1);
  return id;
}

inline std::vector<Source> sources_of(const Case& c) {
  std::vector<Source> sources;
  for (std::size_t k = 0; k < c.sites.size(); ++k) {
    const Site& site = c.sites[k];
    Source source{std::string(1, static_cast<char>('a' + k)), set_of(k), kWeights[k]};
    source.layout = site.layout;
    source.base = {.version = c.rule.traits.relative ? 5 + k : 5,
                   .place = {site.base, 0},
                   .crcs = site.base_crcs};
    source.codec = std::make_shared<Codec>(site.layout, CodecOptions{.encoding = c.encoding});
    sources.push_back(std::move(source));
  }
  return sources;
}

}  // namespace fedcore
