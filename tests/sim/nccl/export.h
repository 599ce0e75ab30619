// How a function of the public API leaves the library: under its own name and, as an alias, under the one with a `p`.
#pragma once

#include "nccl_api.h"

#define SIM_EXPORT extern "C" __attribute__((visibility("default")))
#define SIM_ALIAS(name) \
  extern "C" decltype(name) p##name __attribute__((alias(#name), visibility("default")))
