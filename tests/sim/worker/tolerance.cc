// What `compare` lets pass of stock NCCL's results, which are rounded at other places than the reference.
#include "reference.h"

#include <cstdio>
#include <cstring>
#include <vector>

#include "nccl_calls.h"

namespace worker {

// Beside f16's smallest values, where a rounding is worth a whole step of them, and beside 1. Two ranks.
const char* check_tolerance() {
  struct Case {
    uint16_t want, have;
    double magnitude;
    bool right;
  };
  const Case cases[] = {
      {0x8089, 0x8088, 0x89 * 0x1p-24, true},   // a step of the smallest values
      {0x8089, 0x808b, 0x89 * 0x1p-24, true},   // one for each rank
      {0x8089, 0x808c, 0x89 * 0x1p-24, false},  // more than what two roundings can do
      {0x8001, 0x0001, 0x1p-24, true},          // around zero
      {0x3c00, 0x3c01, 1, true},
      {0x3c00, 0x3c02, 1, true},
      {0x3c00, 0x3c04, 1, false},
  };
  for (const Case& one : cases) {
    Expectation expected;
    expected.bits.resize(2);
    std::memcpy(expected.bits.data(), &one.want, 2);
    expected.magnitude = {one.magnitude};
    uint8_t have[2];
    std::memcpy(have, &one.have, 2);
    std::string note;
    const bool right = compare(expected, have, ncclFloat16, ncclSum, 2, 1, 0, &note) == 0;
    if (right != one.right) return right ? "a wrong result passes for stock NCCL's rounding" : "a rounding is called wrong";
    if (compare(expected, have, ncclFloat16, ncclSum, 2, 1, 2, &note) == 0) return "what is promised to the bit may differ";
  }
  return nullptr;
}

}  // namespace worker
