// How fast AllReduce of 512 KiB to 64 MiB (bf16 sum, f32 accumulation in rank order) gets with plain data and one flag
// per chunk instead of a sentinel in every line. Tries variants, grids and parameters, checks each configuration's
// answers before it times it, and prints the best within each budget of blocks. One process, a host thread per rank,
// windows from cudaMalloc. protocol.cuh states the protocol.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -o bulk_bench scripts/gpu/bulk_bench/bulk_bench.cu
//   ./bulk_bench [--ranks 2|4] [--seconds 60] [--only A,B,C,D] [--blocks 16,24,32] [--trigger]
//
// A push       every worker warp does all phases, software-pipelined (or unpipelined: "unp")
// B pull       the sum stays in its owner's window, the others load it from there into their output
// C push       warps specialised by phase
// D one-shot   (2 ranks) push all, reduce on arrival, pipelined; "stash": own input kept in shared memory
// E one-shot   warps specialised
// F pull       warps specialised by phase
// G push       no service warps: a flag per warp tile, every warp polls and fences for itself
// H one-shot   likewise
//
// Needs GPUs that reach each other; with fewer GPUs than ranks only the answers mean something. Never touches
// multicast. Ends by itself: what does not fit into --seconds is left out, and no wait of a kernel exceeds 2 s.
#include "host.cuh"

namespace {

std::string only = "ABCDEFGH";
std::vector<uint32_t> grid_list = {16, 24, 32, 64, 128};

constexpr size_t kMiB = size_t{1} << 20;
const std::vector<size_t> kSizes = {kMiB / 2, kMiB, 2 * kMiB, 4 * kMiB, 8 * kMiB, 16 * kMiB, 32 * kMiB, 64 * kMiB};

// Three sizes try every set, in the middle grid; their best sets are what the other grids and sizes try.
struct Search {
  std::map<std::tuple<char, size_t, uint32_t>, Best> table;  // by variant, size and grid
  std::map<char, std::vector<Set>> good;                     // the best sets of the tuned sizes
  uint32_t middle;

  Search() : middle(grid_list[0]) {
    for (const uint32_t b : grid_list) {
      if (b <= 32) middle = b;
    }
  }

  // Measures the few best again, for longer.
  void refine(char v, size_t bytes, uint32_t b, std::vector<Best>& all, size_t few) {
    std::sort(all.begin(), all.end(), [](const Best& x, const Best& y) { return x.best < y.best; });
    Best& entry = table[{v, bytes, b}];
    for (size_t i = 0; i < std::min(few, all.size()) && all[i].best < 1e9; i++) {
      Best again = measure(all[i].set, bytes, b, 7);
      if (again.best >= 1e9) again = all[i];
      if (again.best < entry.best) entry = again;
    }
  }

  // Few rounds make distances meaningless: the small sizes also get each set unpipelined.
  static std::vector<Set> extend(std::vector<Set> sets, size_t bytes) {
    if (bytes > 2 * kMiB) return sets;
    for (size_t i = 0, n = sets.size(); i < n; i++) {
      Set s = sets[i];
      if (s.is_spec()) continue;
      if (s.opt == kStash) s.opt = kService;
      s.e2 = s.e3 = 0, s.unpiped = true;
      if (std::find(sets.begin(), sets.end(), s) == sets.end()) sets.push_back(s);
    }
    return sets;
  }

  void remember(char v, const Set& s) {
    std::vector<Set>& known = good[v];
    if (std::find(known.begin(), known.end(), s) == known.end()) known.push_back(s);
  }

  void tune(char v, size_t bytes) {
    std::vector<Best> all;
    for (const Set& s : sets_of(v)) all.push_back(measure(s, bytes, middle, 2));
    refine(v, bytes, middle, all, 3);
    std::vector<Set> chosen;
    for (size_t i = 0; i < std::min<size_t>(8, all.size()) && all[i].best < 1e9; i++) {
      chosen.push_back(all[i].set);
      if (i < 2) remember(v, all[i].set);
    }
    for (const uint32_t b : grid_list) {
      if (b == middle) continue;
      std::vector<Best> others;
      for (const Set& s : extend(chosen, bytes)) others.push_back(measure(s, bytes, b, 2));
      refine(v, bytes, b, others, 2);
      // A set that wins in another grid is a candidate for the other sizes too.
      if (!others.empty() && others[0].best < 1e9) remember(v, others[0].set);
    }
  }

  void try_good(char v, size_t bytes) {
    for (const uint32_t b : grid_list) {
      std::vector<Best> all;
      for (const Set& s : extend(good[v], bytes)) all.push_back(measure(s, bytes, b, 2));
      refine(v, bytes, b, all, 2);
    }
  }

  void run() {
    for (const size_t bytes : {8 * kMiB, kMiB, 64 * kMiB}) {
      for (const char v : only) tune(v, bytes);
      std::printf("tuned %zu KiB after %.1f s, %d measured\n", bytes >> 10, elapsed(), tried);
    }
    for (const size_t bytes : {4 * kMiB, 2 * kMiB, 16 * kMiB, kMiB / 2, 32 * kMiB}) {
      for (const char v : only) try_good(v, bytes);
    }
  }
};

// ---- output ----

void print_budgets(const Search& search) {
  std::printf("\nbest within a budget of blocks; bound: bytes each way / 320 GB/s\n");
  for (const size_t bytes : kSizes) {
    const double each_way = 2.0 * (ranks - 1) / ranks * bytes;
    std::printf("%6zu KiB, bound %.1f us\n", bytes >> 10, each_way / 320e3);
    for (const uint32_t budget : grid_list) {
      Best best;
      char variant = '?';
      for (const auto& [key, entry] : search.table) {
        const auto& [v, size, blocks] = key;
        if (size == bytes && blocks <= budget && entry.best < best.best) best = entry, variant = v;
      }
      if (best.best >= 1e9) continue;
      std::printf("  %3u: %c %8.2f (median %8.2f) %3u blocks, %s\n", budget, variant, best.best, best.median,
                  best.blocks, best.set.text().c_str());
    }
  }
}

void print_variants(const Search& search, uint32_t budget) {
  std::printf("\nbest of each variant within %u blocks\n   ", budget);
  for (const size_t bytes : kSizes) std::printf(" %8zuK", bytes >> 10);
  std::printf("\n");
  for (const char v : only) {
    std::printf("  %c", v);
    for (const size_t bytes : kSizes) {
      double best = 1e9;
      for (const auto& [key, entry] : search.table) {
        const auto& [variant, size, blocks] = key;
        if (variant == v && size == bytes && blocks <= budget) best = std::min(best, entry.best);
      }
      if (best < 1e9) std::printf(" %9.2f", best);
      else std::printf(" %9s", "-");
    }
    std::printf("\n");
  }
}

void print_middle(const Search& search) {
  std::printf("\nwith exactly %u blocks\n", search.middle);
  for (const size_t bytes : {kMiB, 8 * kMiB, 64 * kMiB}) {
    for (const char v : only) {
      const auto at = search.table.find({v, bytes, search.middle});
      if (at == search.table.end() || at->second.best >= 1e9) continue;
      std::printf("  %5zuK %c %8.2f  %s\n", bytes >> 10, v, at->second.best, at->second.set.text().c_str());
    }
  }
}

// ---- options ----

// 0, or what to exit with.
int parse(int argc, char** argv) {
  for (int i = 1; i < argc; i++) {
    const std::string word = argv[i];
    if (word == "--trigger") {
      trigger = true;
    } else if (i + 1 < argc && word == "--ranks") {
      ranks = std::atoi(argv[++i]);
    } else if (i + 1 < argc && word == "--seconds") {
      seconds = std::atof(argv[++i]);
    } else if (i + 1 < argc && word == "--only") {
      only.clear();
      for (const char* c = argv[++i]; *c; c++) {
        if (*c != ',') only += *c;
      }
    } else if (i + 1 < argc && word == "--blocks") {
      grid_list.clear();
      for (char* c = argv[++i]; *c;) {
        const uint32_t b = static_cast<uint32_t>(std::strtoul(c, &c, 10));
        if (b == 0 || b > kReplicas) return std::printf("blocks: 1 to %u\n", kReplicas), 2;
        grid_list.push_back(b);
        while (*c == ',') c++;
      }
      std::sort(grid_list.begin(), grid_list.end());
    } else {
      return std::printf("what is %s?\n", word.c_str()), 2;
    }
  }
  if ((ranks != 2 && ranks != 4) || grid_list.empty()) return std::printf("2 or 4 ranks\n"), 2;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  began = std::chrono::steady_clock::now();
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  if (const int status = parse(argc, argv)) return status;
  CHECK(cudaGetDeviceCount(&devices));
  if (devices == 0) return std::printf("skipped: no GPU\n"), 0;
  rank.resize(ranks);
  prepare();
  cudaDeviceProp property;
  CHECK(cudaGetDeviceProperties(&property, 0));
  std::printf("%d ranks on %d x %s, bf16 sum, us per launch in graphs%s; prepared after %.1f s\n", ranks,
              std::min(devices, ranks), property.name, trigger ? " with the trigger" : "", elapsed());
  if (devices < ranks) std::printf("NOT OVER LINKS: several ranks on a GPU, times mean nothing\n");

  Search search;
  search.run();
  print_budgets(search);
  print_variants(search, grid_list.back());
  if (grid_list.back() != search.middle) print_variants(search, search.middle);
  print_middle(search);
  std::printf("%d measured, %d wrong, %d left out for time, %.1f s\n", tried, wrongs, untimed, elapsed());
  return wrongs == 0 ? 0 : 1;
}
