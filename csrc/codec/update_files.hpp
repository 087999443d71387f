// The files of an update as it is encoded. Shares them with whoever made them.
#pragma once

#include <cstdint>
#include <memory>

#include "base/mapped_file.hpp"

namespace fedcore {

// Flat bytes of a layout that begin at `offset` of a file.
struct FlatBytes {
  std::shared_ptr<MappedFile> file;
  std::uint64_t offset = 0;
};

struct UpdateFiles {
  FlatBytes values;
  FlatBytes base;
  FlatBytes residual;               // without a file: there is none
  FlatBytes lost;                   // the next residual; without a file: it is not computed
  std::shared_ptr<MappedFile> out;  // at least as large as the flat bytes
};

}  // namespace fedcore
