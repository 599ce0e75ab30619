// Fat binaries: just enough to say whether one holds code for a GPU.
#pragma once

#include "sim.h"
#include "topology.h"

namespace twoshot::sim {

// 0 when the image has code for this GPU, else what cuModuleLoadData returns.
CUresult fatbin_fits(const void* image, const Gpu& gpu);

}  // namespace twoshot::sim
