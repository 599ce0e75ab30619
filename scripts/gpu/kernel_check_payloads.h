// What kernel_check.cu's ranks reduce: every pattern, every pair of numbers on a boundary, and any.
#pragma once

#include <random>

#include "kernel_check_reference.h"

namespace {

// Every 16-bit pattern in both halves of a word, against shuffled patterns on the other ranks.
std::vector<Bytes> all_patterns(unsigned ranks) {
  std::vector<Bytes> in(ranks, Bytes(131072 * 2));
  for (unsigned r = 0; r < ranks; r++) {
    for (uint32_t i = 0; i < 131072; i++) {
      const uint32_t base = i % 2 == 0 ? i / 2 : i / 2 * 40503u + 12345u;
      const auto bits = static_cast<uint16_t>(base * (2 * r + 1) + r * 7919u);
      std::memcpy(in[r].data() + 2 * i, &bits, 2);
    }
  }
  return in;
}

// Every pair of f32 values that sit on some boundary.
std::vector<Bytes> f32_boundaries(unsigned ranks) {
  std::vector<uint32_t> values;
  for (const uint32_t magnitude : {0u, 1u, 2u, 0x7FFFFFu, 0x800000u, 0x800001u, 0x3F800000u, 0x3F800001u, 0x33800000u,
                                   0x33800001u, 0x4B800000u, 0x7F7FFFFFu, 0x73000000u, 0x7F800000u, 0x7F800001u,
                                   0x7FC00000u, 0x7FFAFFFAu, 0x7FFAFFFBu, 0x7FFFFFFFu, 0x00FFFFFFu}) {
    values.push_back(magnitude);
    values.push_back(magnitude | 0x80000000u);
  }
  const size_t n = values.size();
  std::vector<Bytes> in(ranks, Bytes(n * n * 4));
  for (unsigned r = 0; r < ranks; r++) {
    for (size_t i = 0; i < n * n; i++) {
      // Ranks beyond the second add zeros that change nothing, or more boundaries.
      const uint32_t bits = r == 0 ? values[i / n] : r == 1 ? values[i % n] : i % 3 == 0 ? values[(i * r) % n] : 0x80000000u;
      std::memcpy(in[r].data() + 4 * i, &bits, 4);
    }
  }
  return in;
}

std::vector<Bytes> random_payload(std::mt19937_64& random, Type type, unsigned ranks, size_t count) {
  const bool any_bits = random() % 3 == 0;
  std::vector<Bytes> in(ranks, Bytes(count * size_of(type)));
  for (auto& bytes : in) {
    if (any_bits) {
      for (size_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<uint8_t>(random());
    } else {
      for (size_t i = 0; i < count; i++) {
        const int number = static_cast<int>(random() % 20001) - 10000;
        uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(number));
        const double wide = number / 64.0;
        if (type == kF64) std::memcpy(&bits, &wide, 8);
        if (is_float(type) && type != kF64) bits = bits_of(type, static_cast<float>(wide));
        std::memcpy(bytes.data() + size_of(type) * i, &bits, size_of(type));
      }
    }
  }
  return in;
}

// Every pair of bytes between neighbouring ranks.
std::vector<Bytes> byte_pairs(unsigned ranks) {
  std::vector<Bytes> in(ranks, Bytes(65536));
  for (unsigned r = 0; r < ranks; r++) {
    for (uint32_t i = 0; i < 65536; i++) in[r][i] = static_cast<uint8_t>((r % 2 ? i >> 8 : i) + r / 2 * 0x35);
  }
  return in;
}

// Every pair of 64-bit words made of two of these halves: numbers on a boundary, and words that mean "not here yet".
std::vector<Bytes> wide_boundaries(unsigned ranks) {
  std::vector<uint64_t> values;
  for (const uint32_t high : {0u, 0x80000000u, 0x000FFFFFu, 0x00100000u, 0x3FF00000u, 0x7FEFFFFFu, 0x7FF00000u,
                              0xFFF00000u, 0x7FF80000u, 0xFFFAFFFAu, 0xFFFAFFFBu, 0xFFFFFFFFu}) {
    for (const uint32_t low : {0u, 1u, 0xFFFAFFFAu, 0x80000000u}) values.push_back(uint64_t{high} << 32 | low);
  }
  const size_t n = values.size();
  std::vector<Bytes> in(ranks, Bytes(n * n * 8));
  for (unsigned r = 0; r < ranks; r++) {
    for (size_t i = 0; i < n * n; i++) {
      const uint64_t bits = r == 0 ? values[i / n] : r == 1 ? values[i % n] : values[(i * (r + 1)) % n];
      std::memcpy(in[r].data() + 8 * i, &bits, 8);
    }
  }
  return in;
}

}  // namespace
