// The tuner of the test plugin, in every version of the table that the simulated NCCL asks for. It proves that the tuner
// door works: with SIM_TUNER=avoid the collective network becomes too dear to be chosen, otherwise costs are left alone.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "nccl_tuner_abi.h"

namespace {

ncclResult_t begin(size_t, size_t, ncclDebugLogger_t, void** context) {
  *context = nullptr;
  return ncclSuccess;
}

template <typename Domains, typename Constants>
ncclResult_t begin_v5(void** context, uint64_t, size_t, size_t, ncclDebugLogger_t, Domains*, Constants*) {
  *context = nullptr;
  return ncclSuccess;
}

ncclResult_t end(void*) { return ncclSuccess; }

ncclResult_t price(float** cost_table, int algorithms, int protocols) {
  const char* wish = getenv("SIM_TUNER");
  if (wish == nullptr || strcmp(wish, "avoid") != 0 || algorithms <= NCCL_ALGO_COLLNET_CHAIN) return ncclSuccess;
  // The table is contiguous; the pointer's type in the ABI says otherwise.
  auto* costs = reinterpret_cast<float*>(cost_table);
  for (int algorithm : {NCCL_ALGO_COLLNET_DIRECT, NCCL_ALGO_COLLNET_CHAIN}) {
    for (int protocol = 0; protocol < protocols; protocol++) {
      costs[algorithm * protocols + protocol] = NCCL_ALGO_PROTO_IGNORE;
    }
  }
  return ncclSuccess;
}

ncclResult_t price_v3(void*, ncclFunc_t, size_t, int, float** costs, int algorithms, int protocols, int*) {
  return price(costs, algorithms, protocols);
}

ncclResult_t price_v4(void*, ncclFunc_t, size_t, int, float** costs, int algorithms, int protocols, int, int*) {
  return price(costs, algorithms, protocols);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED ncclTuner_v3_t ncclTunerPlugin_v3;
ncclTuner_v3_t ncclTunerPlugin_v3 = {"simtuner", begin, price_v3, end};
EXPORTED ncclTuner_v4_t ncclTunerPlugin_v4;
ncclTuner_v4_t ncclTunerPlugin_v4 = {"simtuner", begin, price_v4, end};
EXPORTED ncclTuner_v5_t ncclTunerPlugin_v5;
ncclTuner_v5_t ncclTunerPlugin_v5 = {"simtuner", begin_v5<ncclNvlDomainInfo_v5_t, ncclTunerConstants_v5_t>, price_v4,
                                     end};
EXPORTED ncclTuner_v6_t ncclTunerPlugin_v6;
ncclTuner_v6_t ncclTunerPlugin_v6 = {"simtuner", begin_v5<ncclNvlDomainInfo_v6_t, ncclTunerConstants_v6_t>, price_v4,
                                     end, nullptr};
