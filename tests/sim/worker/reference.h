// Payloads and the reference reduction, made from (seed, call, rank) alone: every rank can say what every other sent.
// Written independently of the libraries under test; conversions go through exact double arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace worker {

using Bytes = std::vector<uint8_t>;

uint64_t mix(uint64_t value);

// Of bytes end to end, however they are cut. Eight at a time, since payloads may be long.
class Digest {
 public:
  void add(const uint8_t* data, size_t bytes);
  bool any() const { return any_; }
  uint64_t value() const { return step(hash_, word_ ^ length_); }

 private:
  static uint64_t step(uint64_t hash, uint64_t word) { return (hash ^ word ^ word >> 32) * 0x100000001b3ull; }

  bool any_ = false;
  uint64_t hash_ = 0xcbf29ce484222325ull;
  uint64_t word_ = 0;  // the last bytes, which are not eight yet
  uint64_t length_ = 0;
};

// A stream of decisions that is the same wherever it is made from the same numbers.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  Random(uint64_t seed, uint64_t a, uint64_t b = 0) : state_(mix(seed) ^ mix(a * 3 + 1) ^ mix(b * 5 + 2)) {}
  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15ull); }
  uint64_t below(uint64_t limit) { return limit ? next() % limit : 0; }

 private:
  uint64_t state_;
};

// Names: i8 u8 i32 u32 i64 u64 f16 f32 f64 bf16 e4m3 e5m2; sum prod max min avg. -1 when unknown.
int type_by_name(const std::string& name);
int op_by_name(const std::string& name);
size_t type_bytes(int type);
bool is_float(int type);

struct Payload {
  enum Kind { kRandom, kPattern, kWords, kPairs };
  Kind kind = kRandom;
  uint64_t seed = 0;
  uint64_t call = 0;
  uint64_t first = 0;  // index of element 0 in a longer payload, of which this is a slice
  bool special = true;  // NaN, infinities, subnormals, both zeros, sentinel look-alikes among the values
  // kPattern: `carrier` walks through bit patterns in every `stride`-th element, starting at `phase`; the rest and the
  // other ranks hold `filler`.
  int carrier = 0;
  uint64_t phase = 0;
  uint32_t filler = 0;
  // kWords: these 32-bit words in turn, every rank beginning with another; 16-bit types fill both halves from them.
  std::vector<uint32_t> words;
  // kPairs: every pair of bytes between two neighbouring ranks, for types of one byte: 65536 elements hold all of them.
};

// The bits of element `index` of `rank`.
uint64_t element(const Payload& payload, int type, int rank, uint64_t index);
Bytes make_input(const Payload& payload, int type, int rank, size_t first, size_t count);

// What the values mean, and back. Only for types of at most 32 bits that are floats.
float decode(int type, uint64_t bits);
uint64_t encode(int type, double value);

struct Expectation {
  Bytes bits;                    // the exact result
  std::vector<double> magnitude;  // sum of absolute values, for the tolerant comparison; empty for exact types
};

// The factor of a rank in a pre-multiplied sum, in the type's bits: another on every rank, special values among them if the
// payload has some. `each`: for types of one byte, every byte in turn by the number of the call.
uint64_t factor_of(const Payload& payload, int type, int rank, bool each);
// The product as NCCL rounds it.
uint64_t product(int type, uint64_t a, uint64_t b);

// The reduction over `ranks` ranks of elements [first, first + count): f32 accumulation in rank order, one rounding.
// With `factors`, one for each rank, every element is multiplied before. Without `magnitudes` it is for exact comparison.
Expectation reduce_reference(const Payload& payload, int type, int op, int ranks, size_t first, size_t count,
                             const std::vector<uint64_t>& factors = {}, bool magnitudes = true);

// Number of wrong elements; `note` describes the first. NaN equals any NaN.
size_t compare(const Expectation& expected, const uint8_t* got, int type, int op, int ranks, size_t count, int exact,
               std::string* note);

// What is wrong with how `compare` tells a rounding of stock NCCL's from an error; nullptr if nothing is.
const char* check_tolerance();

}  // namespace worker
