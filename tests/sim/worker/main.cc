// sim_worker: options, lanes and threads, the summary. See worker.h and script.cc for what a script may say.
//
//   sim_worker --check-tolerance
//   sim_worker --rank R --ranks N --device D --id FILE --program SCRIPT [--nccl PATH] [--threads T | --gpus G]
//              [--devices a,b,..] [--exact 0|1|2|3] [--blocking 0|1] [--timeout SECONDS]
//
// SCRIPT is a file's name or the text itself. One JSON line for each command, one as summary; 0 only if all was right.
#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "nccl_calls.h"
#include "worker.h"

namespace worker {
namespace {

void* library = nullptr;

// A stuck program must end with a word, not with the patience of its caller.
void start_watchdog(int seconds, int rank) {
  std::thread([seconds, rank] {
    std::this_thread::sleep_for(std::chrono::seconds(seconds));
    print_line("{\"summary\":true,\"rank\":" + std::to_string(rank) + ",\"ok\":false,\"error\":\"timeout\"}");
    _exit(4);
  }).detach();
}

// Finds a function of the libraries under test, however they came into the process. The opened library goes first:
// the linked one may be another copy.
void* find_function(const char* name) {
  if (library) {
    if (void* found = dlsym(library, name)) return found;
  }
  std::string names;
  for (const char* variable : {"TWOSHOT_NCCL_LIBRARY", "NCCL_NET_PLUGIN", "TWOSHOT_LIBRARY"}) {
    if (const char* value = getenv(variable)) names += std::string(value) + ",";
  }
  for (const std::string& path : split_list(names, ',')) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!handle) continue;
    void* found = dlsym(handle, name);
    dlclose(handle);
    if (found) return found;
  }
  return dlsym(RTLD_DEFAULT, name);
}

Lane make_lane(int rank, int device) {
  Lane lane;
  lane.rank = rank;
  CUresult result = cuDeviceGet(&lane.device, device);
  if (result != CUDA_SUCCESS) throw std::runtime_error("device: CUDA error " + std::to_string(result));
  lane.open();
  return lane;
}

bool mentions(const std::vector<Statement>& program, const std::string& name) {
  for (const Statement& s : program) {
    if (s.name == name || mentions(s.body, name)) return true;
  }
  return false;
}

// Commands that a program gets when it does not say otherwise.
void complete(std::vector<Statement>& program) {
  if (!mentions(program, "init") && !mentions(program, "init_all")) {
    Statement init;
    init.name = "init";
    program.insert(program.begin(), init);
  }
  bool ends = mentions(program, "destroy") || mentions(program, "abort") || mentions(program, "leave");
  if (!ends) {
    Statement destroy;
    destroy.name = "destroy";
    program.push_back(destroy);
  }
  for (size_t i = 0; i < program.size();) {
    if (program[i].name == "leave") {
      program.erase(program.begin() + long(i));
    } else {
      ++i;
    }
  }
}

int run(const Options& options, const std::string& nccl, const std::string& text) {
  std::vector<Statement> program = parse(text);
  complete(program);
  if (!nccl.empty()) open_nccl(nccl.c_str());
  CUresult result = cuInit(0);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuInit: CUDA error " + std::to_string(result));
  Tally total;
  std::mutex lock;
  std::string failure;
  auto drive = [&](int first, int count) {
    try {
      std::vector<Lane> lanes;
      for (int i = first; i < first + count; ++i) {
        lanes.push_back(make_lane(options.rank + i, options.devices.at(size_t(i))));
      }
      Driver driver(options, std::move(lanes));
      driver.run(program);
      driver.close();
      std::lock_guard<std::mutex> guard(lock);
      total.calls += driver.tally().calls;
      total.wrong += driver.tally().wrong;
      total.errors += driver.tally().errors;
    } catch (const std::exception& error) {
      std::lock_guard<std::mutex> guard(lock);
      failure = error.what();
    }
  };
  if (options.threads) {
    std::vector<std::thread> threads;
    for (int i = 0; i < options.lanes; ++i) threads.emplace_back(drive, i, 1);
    for (auto& thread : threads) thread.join();
  } else {
    drive(0, options.lanes);
  }
  bool ok = failure.empty() && total.wrong == 0 && total.errors == 0;
  std::string line = "{\"summary\":true,\"rank\":" + std::to_string(options.rank);
  line += std::string(",\"ok\":") + (ok ? "true" : "false") +
                     ",\"calls\":" + std::to_string(total.calls) + ",\"wrong\":" + std::to_string(total.wrong) +
                     ",\"errors\":" + std::to_string(total.errors) + counters();
  if (!failure.empty()) line += ",\"error\":\"" + json_escape(failure) + "\"";
  print_line(line + "}");
  return ok ? 0 : 1;
}

}  // namespace

bool paths(uint64_t* routed, uint64_t* stock) {
  using Counters = int (*)(uint64_t*, uint64_t*);
  auto get = reinterpret_cast<Counters>(find_function("twoshot_counters"));
  if (get) get(routed, stock);
  return get != nullptr;
}

std::string description(ncclComm_t comm) {
  struct {
    uint32_t size, state, ranks, hosts, arch, nccl, multicast, blocks;
    uint64_t oneshot, twoshot, in_switch, bulk;
  } said = {};
  said.size = sizeof said;
  using Describe = int (*)(ncclComm_t, void*);
  auto ask = reinterpret_cast<Describe>(find_function("twoshot_describe"));
  if (!ask || ask(comm, &said) != 0) return "";
  return "state " + std::to_string(said.state) + ", multicast " + std::to_string(said.multicast) + ", one-shot " +
         std::to_string(said.oneshot) + ", two-shot " + std::to_string(said.twoshot) + ", bulk " +
         std::to_string(said.bulk);
}

std::string counters() {
  std::string text;
  uint64_t routed = 0;
  uint64_t stock = 0;
  if (paths(&routed, &stock)) {
    text += ",\"routed\":" + std::to_string(routed) + ",\"stock\":" + std::to_string(stock);
  }
  using Calls = uint64_t (*)(const char*);
  if (auto calls = reinterpret_cast<Calls>(find_function("sim_nccl_calls"))) {
    text += ",\"nccl_allreduce_calls\":" + std::to_string(calls("ncclAllReduce"));
  }
  if (auto runs = reinterpret_cast<Calls>(find_function("sim_nccl_executions"))) {
    text += ",\"nccl_allreduce_runs\":" + std::to_string(runs("ncclAllReduce"));
    text += ",\"nccl_send_runs\":" + std::to_string(runs("ncclSend"));
    text += ",\"nccl_collnet_runs\":" + std::to_string(runs("collnet"));
  }
  return text;
}

void open_nccl(const char* path) {
  library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("dlopen: ") + dlerror());
}

void* opened_library() { return library; }

void* opened_function(const char* name) {
  if (!library) return nullptr;
  void* found = dlsym(library, name);
  if (!found) {
    print_line(std::string("{\"summary\":true,\"ok\":false,\"error\":\"the library lacks ") + name + "\"}");
    _exit(3);
  }
  return found;
}

void print_line(const std::string& line) {
  std::string whole = line + "\n";
  fflush(stdout);
  if (write(STDOUT_FILENO, whole.data(), whole.size()) < 0) _exit(5);
}

std::string json_escape(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out;
}

}  // namespace worker

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--check-tolerance") {
    const char* wrong = worker::check_tolerance();
    printf("%s\n", wrong ? wrong : "ok");
    return wrong ? 1 : 0;
  }
  worker::Options options;
  std::string nccl, program;
  int device = 0;
  std::string devices;
  for (int i = 1; i + 1 < argc; i += 2) {
    std::string key = argv[i];
    std::string value = argv[i + 1];
    if (key == "--rank") options.rank = atoi(value.c_str());
    else if (key == "--ranks") options.ranks = atoi(value.c_str());
    else if (key == "--device") device = atoi(value.c_str());
    else if (key == "--devices") devices = value;
    else if (key == "--id") options.id = value;
    else if (key == "--nccl") nccl = value;
    else if (key == "--program") program = value;
    else if (key == "--threads") options.lanes = atoi(value.c_str()), options.threads = true;
    else if (key == "--gpus") options.lanes = atoi(value.c_str());
    else if (key == "--exact") options.exact = atoi(value.c_str());
    else if (key == "--blocking") options.blocking = atoi(value.c_str());
    else if (key == "--timeout") options.timeout_s = atoi(value.c_str());
    else {
      fprintf(stderr, "sim_worker: unknown option %s\n", key.c_str());
      return 2;
    }
  }
  if (program.empty() || options.lanes < 1) {
    fprintf(stderr, "sim_worker: --program is needed\n");
    return 2;
  }
  for (const std::string& part : worker::split_list(devices, ',')) options.devices.push_back(atoi(part.c_str()));
  while (int(options.devices.size()) < options.lanes) {
    options.devices.push_back(device + int(options.devices.size()));
  }
  std::ifstream file(program);
  if (file) {
    std::stringstream whole;
    whole << file.rdbuf();
    program = whole.str();
  }
  worker::start_watchdog(options.timeout_s, options.rank);
  int code;
  try {
    code = worker::run(options, nccl, program);
  } catch (const std::exception& error) {
    worker::print_line("{\"summary\":true,\"rank\":" + std::to_string(options.rank) + ",\"ok\":false,\"error\":\"" +
                       worker::json_escape(error.what()) + "\"}");
    code = 2;
  }
  return code;
}
