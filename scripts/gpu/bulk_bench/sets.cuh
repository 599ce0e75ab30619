// Sets of parameters: which ones each variant tries, the kernel each of them stands for, and the sizes and grids where
// it makes sense.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <tuple>
#include <vector>

#include "pipelined.cuh"
#include "specialised.cuh"

namespace {

using Kernel = void (*)(Args);

int ranks = 2, devices = 0, multiprocessors = 132;
bool trigger = false;  // every launch lets its successor in

struct Set {  // parameters, whatever the size and the grid
  char variant;
  int u, opt;
  uint32_t w1, w2, w3, chunk, e2, e3;
  bool unpiped;
  bool operator<(const Set& o) const {
    const auto key = [](const Set& s) {
      return std::tuple(s.variant, s.u, s.opt, s.w1, s.w2, s.w3, s.chunk, s.e2, s.e3, s.unpiped);
    };
    return key(*this) < key(o);
  }
  bool operator==(const Set& o) const { return !(*this < o) && !(o < *this); }
  bool is_spec() const { return variant == 'C' || variant == 'E' || variant == 'F'; }
  bool is_direct() const { return variant == 'G' || variant == 'H'; }
  bool is_oneshot() const { return variant == 'D' || variant == 'E' || variant == 'H'; }
  uint32_t workers() const { return is_spec() ? w1 + w2 + w3 : w1; }
  uint32_t threads() const { return 32 * (workers() + (is_direct() ? 0 : 2)); }
  std::string text() const {
    char s[128];
    int n = std::snprintf(s, sizeof s, "U%d chunk %gK thr %u", u, chunk / 1024.0, threads());
    if (is_spec()) std::snprintf(s + n, sizeof s - n, is_oneshot() ? " warps %u/%u" : " warps %u/%u/%u", w1, w2, w3);
    else if (unpiped) std::snprintf(s + n, sizeof s - n, " unp");
    else if (is_oneshot()) std::snprintf(s + n, sizeof s - n, " d %u%s", e2, opt == kStash ? " stash" : "");
    else std::snprintf(s + n, sizeof s - n, " d1 %u d2 %u", e3, e3 - e2);
    return s;
  }
};

template <int N>
Kernel kernel_of(const Set& s) {
  const int u = s.u;
  if constexpr (N == 2) {
    switch (s.variant) {
      case 'A': return u == 2 ? fused<2, 2, kPush, kService> : fused<2, 4, kPush, kService>;
      case 'B': return u == 2 ? fused<2, 2, kPull, kService> : fused<2, 4, kPull, kService>;
      case 'C': return u == 2 ? specialised<2, 2, kPush> : specialised<2, 4, kPush>;
      case 'D':
        if (s.opt == kStash) return u == 2 ? fused<2, 2, kOneShot, kStash> : fused<2, 4, kOneShot, kStash>;
        return u == 2 ? fused<2, 2, kOneShot, kService> : fused<2, 4, kOneShot, kService>;
      case 'E': return u == 2 ? specialised<2, 2, kOneShot> : specialised<2, 4, kOneShot>;
      case 'F': return u == 2 ? specialised<2, 2, kPull> : specialised<2, 4, kPull>;
      case 'G': return u == 2 ? fused<2, 2, kPush, kDirect> : fused<2, 4, kPush, kDirect>;
      case 'H': return u == 2 ? fused<2, 2, kOneShot, kDirect> : fused<2, 4, kOneShot, kDirect>;
    }
  } else {
    switch (s.variant) {
      case 'A': return u == 1 ? fused<4, 1, kPush, kService> : fused<4, 2, kPush, kService>;
      case 'B': return u == 1 ? fused<4, 1, kPull, kService> : fused<4, 2, kPull, kService>;
      case 'C': return specialised<4, 2, kPush>;
      case 'F': return specialised<4, 2, kPull>;
      case 'G': return fused<4, 1, kPush, kDirect>;
    }
  }
  return nullptr;
}
Kernel kernel_for(const Set& s) { return ranks == 2 ? kernel_of<2>(s) : kernel_of<4>(s); }

std::vector<Set> sets_of(char v) {
  std::vector<Set> all;
  const std::vector<uint32_t> chunks = {4096, 8192, 16384, 32768};
  struct Shape {
    int u;
    uint32_t w;
  };
  const bool two = ranks == 2;
  const std::vector<Shape> shapes = two ? std::vector<Shape>{{4, 16}, {2, 16}, {4, 8}, {2, 30}}
                                        : std::vector<Shape>{{2, 16}, {1, 16}, {2, 8}, {1, 30}};
  struct Gap {
    uint32_t e2, e3;
  };
  const std::vector<Gap> gaps = {{1, 2}, {2, 3}, {2, 4}, {3, 6}, {4, 8}, {0, 0}};
  const auto add = [&](Set s) {
    const uint32_t tile = 512u * s.u, per = s.chunk / tile, w = s.w1;
    // Distances grow until every tile of an awaited chunk is stored in an earlier round: see Progress in protocol.cuh.
    if (!s.is_spec() && !s.unpiped) {
      const uint32_t least = w % per == 0 ? 1 : per % w == 0 ? per / w : 1 + (w + per - 2) / w;
      if (s.e2 < least) s.e3 += least - s.e2, s.e2 = least;
      if (s.e3 < s.e2 + least) s.e3 = s.e2 + least;
    }
    if (s.is_oneshot()) s.e3 = 0;
    if (s.opt == kStash && (s.unpiped || size_t{s.e2 + 1} * s.u * s.w1 * 512 > kMaxStash)) return;
    if (std::find(all.begin(), all.end(), s) == all.end()) all.push_back(s);
  };
  switch (v) {
    case 'A':
    case 'B':
      for (const auto& p : shapes)
        for (const uint32_t c : chunks)
          for (const auto& g : gaps) add({v, p.u, kService, p.w, 0, 0, c, g.e2, g.e3, g.e2 == 0});
      break;
    case 'G':
      for (const auto& p : shapes) {
        if (!two && p.u != 1) continue;
        for (const auto& g : gaps) add({v, p.u, kDirect, p.w, 0, 0, 512u * p.u, g.e2, g.e3, g.e2 == 0});
      }
      break;
    case 'D':
      if (!two) break;
      for (const int opt : {int{kService}, int{kStash}})
        for (const auto& p : shapes)
          for (const uint32_t c : chunks)
            for (const uint32_t e : {1u, 2u, 3u, 5u, 8u, 0u}) add({v, p.u, opt, p.w, 0, 0, c, e, 0, e == 0});
      break;
    case 'H':
      if (!two) break;
      for (const auto& p : shapes)
        for (const uint32_t e : {1u, 2u, 3u, 5u, 0u}) add({v, p.u, kDirect, p.w, 0, 0, 512u * p.u, e, 0, e == 0});
      break;
    case 'C':
    case 'F': {
      struct Split {
        int u;
        uint32_t w1, w2, w3;
      };
      const std::vector<Split> splits =
          two ? std::vector<Split>{{4, 4, 8, 4}, {4, 5, 6, 5},  {4, 3, 8, 5}, {4, 8, 14, 8},
                                   {2, 4, 8, 4}, {2, 8, 14, 8}, {2, 8, 16, 6}}
              : std::vector<Split>{{2, 4, 8, 4}, {2, 5, 8, 5}, {2, 6, 6, 4}};
      for (const auto& p : splits)
        for (const uint32_t c : chunks) add({v, p.u, kService, p.w1, p.w2, p.w3, c, 0, 0, false});
      break;
    }
    case 'E': {
      if (!two) break;
      struct Split {
        int u;
        uint32_t w1, w2;
      };
      const std::vector<Split> splits = {{4, 4, 12},  {4, 6, 10}, {4, 8, 8},   {4, 8, 16},
                                         {4, 10, 20}, {2, 6, 10}, {2, 10, 20}, {2, 12, 18}};
      for (const auto& p : splits)
        for (const uint32_t c : chunks) add({v, p.u, kService, p.w1, p.w2, 0, c, 0, 0, false});
      break;
    }
  }
  return all;
}

// The launch arguments, except for what differs by rank; false where the set makes no sense for this size and grid.
bool arguments(const Set& s, size_t bytes, uint32_t blocks, Args& a, size_t& dynamic) {
  a = Args{};
  const size_t shard = s.is_oneshot() ? bytes : bytes / ranks;
  if (bytes % (16 * ranks) != 0 || shard % s.chunk != 0 || shard < s.chunk) return false;
  a.bytes = bytes;
  a.shard_bytes = static_cast<uint32_t>(shard);
  a.chunks = static_cast<uint32_t>(shard / s.chunk);
  while ((16u << a.chunk_shift) < s.chunk) a.chunk_shift++;
  a.kmax = (a.chunks + blocks - 1) / blocks;
  if (a.kmax * blocks > kMaxFlags) return false;
  a.w1 = s.w1, a.w2 = s.w2, a.w3 = s.w3;
  const uint32_t rounds = (a.kmax * (s.chunk / (512 * s.u)) + s.w1 - 1) / s.w1;
  a.e2 = s.e2, a.e3 = s.e3;
  if (s.unpiped) {
    a.e2 = rounds, a.e3 = 2 * rounds;
  } else if (!s.is_spec() && s.e2 >= rounds && s.opt != kStash) {
    return false;  // the unpipelined set is the same thing
  } else if (s.opt == kStash && s.e2 > rounds) {
    return false;
  }
  a.trigger = trigger;
  dynamic = s.opt == kStash ? size_t{s.e2 + 1} * s.u * s.w1 * 512 : 0;
  const int share = (ranks + devices - 1) / devices;
  return static_cast<int>(blocks) * share <= multiprocessors;
}

}  // namespace
