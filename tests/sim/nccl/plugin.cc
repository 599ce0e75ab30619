// The loader: which names are opened, which versions are asked for, what happens when a plugin declines. The rules
// follow the releases of NCCL and are chosen by SIM_NCCL_VERSION. Touches the dynamic loader and plugins alone.
//
//   release          net tables    tuner  names in NCCL_NET_PLUGIN                          declined one stays loaded
//   2.20             v8            (v1)   libnccl-net-<name>.so only                        yes
//   2.21 - 2.23      v8            v3(a)  as given, then libnccl-net-<name>.so              until the communicator ends
//   2.24, 2.25       v9, v8        v4     the same                                          until the communicator ends
//   2.26             v10 .. v8     v4     the same                                          yes (reference held)
//   2.27.3           v10 .. v8     v4     lib<x>.so as given, else libnccl-net-<name>.so    yes (reference held)
//   2.27.5 - 2.27.7  v10 .. v8     v4     as given, then libnccl-net-<name>.so              yes (reference held)
//   2.28, 2.29       v11 .. v8     v5     the same                                          yes (never unloaded)
//   2.30 and later   v12 .. v8     v6     the same                                          yes (never unloaded)
// (a) from 2.22. A comma-separated list is understood from 2.27.3. Versions below v8 and tuners below v3 are left out.
#include "plugin.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "debug.h"

namespace simnccl {
namespace {

enum class State { kReady, kLoaded, kEnabled, kDisabled, kFailed };

struct Slot {
  std::string name;
  std::string opened;
  void* library = nullptr;
  NetApi net;
  CollNetApi collnet;
  bool has_collnet = false;
  State state = State::kReady;
  State collnet_state = State::kReady;
  int references = 0;
  int loads = 0;  // releases before 2.26: communicators that found the library open, declined or not
  // Versions before v11 are initialised once for the process; this counts communicators.
  int net_inits = 0;
  int collnet_inits = 0;
};

struct Loader {
  std::mutex lock;
  bool named = false;
  std::vector<Slot> slots;
  State tuner_state = State::kReady;
  void* tuner_library = nullptr;
  TunerApi tuner;
  int tuner_references = 0;
};

// Never destroyed, as plugins are not either.
Loader& loader() {
  static auto* one = new Loader;
  return *one;
}

int newest_net() {
  int code = version();
  return code >= 23000 ? 12 : code >= 22800 ? 11 : code >= 22600 ? 10 : code >= 22400 ? 9 : 8;
}

int newest_tuner() {
  int code = version();
  return code >= 23000 ? 6 : code >= 22800 ? 5 : code >= 22400 ? 4 : code >= 22200 ? 3 : 0;
}

void* open_one(const char* kind, const std::string& name, std::string* missing) {
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library) return library;
  const char* error = dlerror();
  if (error && strstr(error, "No such file or directory")) {
    *missing += " " + name;
  } else {
    SIM_INFO("%s/Plugin: %s: %s", kind, name.c_str(), error ? error : "");
  }
  return nullptr;
}

// `opened` becomes the name that the dynamic loader knows.
void* open_library(const char* kind, const char* prefix, const std::string& name, std::string* opened) {
  std::string missing;
  void* library = nullptr;
  int code = version();
  bool library_name =
      name.size() >= 7 && name.compare(0, 3, "lib") == 0 && name.compare(name.size() - 3, 3, ".so") == 0;
  std::string wrapped = std::string(prefix) + "-" + name + ".so";
  std::vector<std::string> tries;
  if (name.empty()) {
    tries = {std::string(prefix) + ".so"};
  } else if (code < 22100) {
    tries = {wrapped};
  } else if (code >= 22703 && code < 22705) {
    tries = {library_name ? name : wrapped};
  } else {
    tries = {name};
    if (code < 22705 || (name.find('/') == std::string::npos && !library_name)) tries.push_back(wrapped);
  }
  for (const std::string& one : tries) {
    library = open_one(kind, one, &missing);
    *opened = one;
    if (library) break;
  }
  if (!missing.empty() && !library) SIM_INFO("%s/Plugin: Could not find:%s", kind, missing.c_str());
  return library;
}

void read_names(Loader& all) {
  all.named = true;
  const char* text = getenv("NCCL_NET_PLUGIN");
  if (!text) {
    all.slots.emplace_back();
    all.slots.back().name = "libnccl-net.so";
    if (version() < 22703) all.slots.back().name.clear();
    return;
  }
  SIM_INFO("NCCL_NET_PLUGIN set by environment to %s", text);
  std::string list = strcasecmp(text, "none") == 0 ? "" : text;
  if (version() < 22703) {
    if (strcasecmp(text, "none") == 0) return;
    all.slots.emplace_back();
    all.slots.back().name = list;
    return;
  }
  for (size_t start = 0; start < list.size();) {
    size_t end = std::min(list.find(',', start), list.size());
    if (end > start && all.slots.size() < 14) {
      all.slots.emplace_back();
      all.slots.back().name = list.substr(start, end - start);
    }
    start = end + 1;
  }
}

void load(Slot& slot) {
  slot.library = open_library("NET", "libnccl-net", slot.name, &slot.opened);
  if (!slot.library) {
    slot.state = State::kFailed;
    return;
  }
  if (!find_net(slot.library, newest_net(), 8, &slot.net)) {
    SIM_INFO("External network plugin %s is unsupported", slot.name.c_str());
    dlclose(slot.library);
    slot.library = nullptr;
    slot.state = State::kFailed;
    return;
  }
  slot.state = State::kLoaded;
  slot.has_collnet = find_collnet(slot.library, newest_net(), 8, &slot.collnet);
  slot.collnet_state = slot.has_collnet ? State::kLoaded : State::kFailed;
  SIM_INFO("Successfully loaded external network plugin %s", slot.name.c_str());
}

// True when the plugin is enabled for this communicator.
bool init_slot(Slot& slot, Comm& comm, PluginUse& use) {
  bool per_comm = slot.net.version >= 11;
  bool initialised = false;
  int devices = 0;
  ncclResult_t status = ncclSuccess;
  if (per_comm || slot.net_inits++ == 0) {
    status = slot.net.init(&use.net_context, comm.hash, comm.traffic_class);
    initialised = status == ncclSuccess;
  }
  if (status == ncclSuccess && slot.state == State::kLoaded) {
    status = slot.net.devices(&devices);
    if (status == ncclSuccess && devices <= 0) status = ncclInternalError;
  }
  if (status != ncclSuccess) {
    if (version() >= 22803) SIM_INFO("Failed to initialize NET plugin %s", slot.net.name);
    // 2.28 and the first 2.29 finalise even what did not come up.
    if (per_comm && (initialised || version() < 22907)) slot.net.finalize(use.net_context);
    slot.state = slot.collnet_state = State::kDisabled;
    use.net_context = nullptr;
    return false;
  }
  slot.state = State::kEnabled;
  if (version() >= 22703) SIM_INFO("Initialized NET plugin %s", slot.net.name);
  if (slot.collnet_state == State::kLoaded || slot.collnet_state == State::kEnabled) {
    bool collnet_per_comm = slot.collnet.version >= 11;
    status = collnet_per_comm || slot.collnet_inits++ == 0 ? slot.collnet.init(&use.collnet_context, comm.hash)
                                                            : ncclSuccess;
    if (status == ncclSuccess && slot.collnet_state == State::kLoaded) {
      status = slot.collnet.devices(&devices);
      if (status == ncclSuccess && devices <= 0) status = ncclInternalError;
    }
    slot.collnet_state = status == ncclSuccess ? State::kEnabled : State::kDisabled;
  }
  return true;
}

bool name_matches(const Comm& comm, const char* name) {
  if (!comm.net_name.empty()) return strcasecmp(comm.net_name.c_str(), name) == 0;
  const char* wanted = getenv("NCCL_NET");
  return !wanted || !*wanted || strcasecmp(wanted, name) == 0;
}

}  // namespace

ncclResult_t plugin_attach(Comm& comm) {
  Loader& all = loader();
  std::lock_guard<std::mutex> guard(all.lock);
  comm.plugin = std::make_shared<PluginUse>();
  PluginUse& use = *comm.plugin;
  if (!all.named) read_names(all);
  for (size_t i = 0; i < all.slots.size(); ++i) {
    Slot& slot = all.slots[i];
    if (slot.state == State::kReady) {
      load(slot);
      use.loader = slot.library != nullptr;
    }
    if (slot.library) ++slot.loads;
    if (slot.state != State::kLoaded && slot.state != State::kEnabled) continue;
    if (!name_matches(comm, slot.net.name)) continue;
    if (!init_slot(slot, comm, use)) continue;
    if (slot.net.properties(0) != ncclSuccess) continue;
    ++slot.references;
    use.slot = int(i);
    use.collnet = slot.collnet_state == State::kEnabled;
    use.collnet_api = slot.collnet;
    SIM_INFO("Assigned NET plugin %s to comm", slot.net.name);
    for (size_t other = 0; other < all.slots.size(); ++other) {
      if (other == i || all.slots[other].state == State::kDisabled) continue;
      SIM_INFO("Disabling external plugins: %s", all.slots[other].name.c_str());
      all.slots[other].state = State::kDisabled;
    }
    return ncclSuccess;
  }
  if (!name_matches(comm, "Socket")) {
    SIM_WARN("Failed to initialize any NET plugin");
    return ncclInvalidUsage;
  }
  SIM_INFO("Initialized NET plugin Socket");
  SIM_INFO("Assigned NET plugin Socket to comm");
  return ncclSuccess;
}

ncclResult_t tuner_attach(Comm& comm) {
  Loader& all = loader();
  std::lock_guard<std::mutex> guard(all.lock);
  int newest = newest_tuner();
  if (newest == 0 || all.tuner_state == State::kFailed) return ncclSuccess;
  if (all.tuner_state == State::kReady) {
    const char* text = getenv("NCCL_TUNER_PLUGIN");
    if (text) SIM_INFO("NCCL_TUNER_PLUGIN set by environment to %s", text);
    bool none = text && strcasecmp(text, "none") == 0 && version() >= 22803;
    std::string opened;
    if (!none) all.tuner_library = open_library("TUNER", "libnccl-tuner", text ? text : "", &opened);
    if (!none && !all.tuner_library) {
      // A tuner may be packed into the network plugin: the last one that was opened, declined or not.
      for (const Slot& slot : all.slots) {
        if (slot.library) all.tuner_library = dlopen(slot.opened.c_str(), RTLD_NOW | RTLD_LOCAL);
      }
    }
    if (!all.tuner_library || !find_tuner(all.tuner_library, newest, 3, &all.tuner)) {
      if (all.tuner_library && version() >= 22803) dlclose(all.tuner_library);
      all.tuner_library = nullptr;
      all.tuner_state = State::kFailed;
      return ncclSuccess;
    }
    all.tuner_state = State::kEnabled;
  }
  ++all.tuner_references;
  comm.plugin->tuner = true;
  return all.tuner.init(&comm.plugin->tuner_context, comm);
}

bool tuner_prefers_collnet(Comm& comm, int collective, size_t bytes, bool base) {
  if (!comm.plugin || !comm.plugin->tuner) return base;
  float costs[NCCL_NUM_ALGORITHMS][NCCL_NUM_PROTOCOLS];
  for (auto& row : costs) {
    for (float& cost : row) cost = NCCL_ALGO_PROTO_IGNORE;
  }
  for (float& cost : costs[NCCL_ALGO_TREE]) cost = 30;
  for (float& cost : costs[NCCL_ALGO_RING]) cost = 40;
  if (base) costs[NCCL_ALGO_COLLNET_DIRECT][NCCL_PROTO_SIMPLE] = float(env_number("SIM_NCCL_COLLNET_COST", 20));
  int channels = 0;
  Loader& all = loader();
  ncclResult_t status = all.tuner.coll_info(comm.plugin->tuner_context, collective, bytes, &costs[0][0],
                                            NCCL_NUM_ALGORITHMS, NCCL_NUM_PROTOCOLS, &channels);
  if (status != ncclSuccess) return base;
  if (channels != 0) {
    // NCCL takes the number as it comes, and would use channels that do not exist.
    int there = std::max(2, int(env_number("NCCL_MIN_NCHANNELS", 0)));
    if (channels < 0 || channels > there) {
      SIM_WARN("TUNER/Plugin: %d channels asked for, there are %d", channels, there);
      return false;
    }
    SIM_INFO("TUNER/Plugin: %d channels for %zu bytes", channels, bytes);
  }
  float best = -1;
  bool collnet = false;
  for (int algorithm = 0; algorithm < NCCL_NUM_ALGORITHMS; ++algorithm) {
    for (float cost : costs[algorithm]) {
      if (cost < 0 || (best >= 0 && cost >= best)) continue;
      best = cost;
      collnet = algorithm == NCCL_ALGO_COLLNET_DIRECT || algorithm == NCCL_ALGO_COLLNET_CHAIN;
    }
  }
  return collnet && base;
}

void plugin_detach(Comm& comm) {
  if (!comm.plugin) return;
  Loader& all = loader();
  std::lock_guard<std::mutex> guard(all.lock);
  PluginUse& use = *comm.plugin;
  if (use.tuner) {
    all.tuner.finish(use.tuner_context);
    if (--all.tuner_references == 0) {
      SIM_INFO("TUNER/Plugin: Closing tuner: '%s'", all.tuner.name);
      dlclose(all.tuner_library);
      all.tuner_library = nullptr;
      all.tuner_state = State::kReady;
    }
  }
  int code = version();
  if (use.slot >= 0) {
    Slot& slot = all.slots[size_t(use.slot)];
    if (slot.net.version >= 11) slot.net.finalize(use.net_context);
    if (use.collnet && slot.collnet.version >= 11) slot.collnet.finalize(use.collnet_context);
    --slot.references;
  }
  // Before 2.26 the communicator that opened the library may close it, if no other came after. 2.26 and 2.27 hold a
  // reference of their own; later releases unload only what a communicator had been given.
  for (size_t i = 0; i < all.slots.size(); ++i) {
    Slot& slot = all.slots[i];
    bool unload = code >= 22803 ? use.slot == int(i) && slot.references == 0
                                : code >= 22100 && code < 22600 && use.loader && --slot.loads == 0;
    if (!slot.library || !unload) continue;
    SIM_INFO("Unloading plugin %s", slot.name.c_str());
    dlclose(slot.library);
    std::string name = slot.name;
    slot = Slot();
    slot.name = name;
  }
  comm.plugin.reset();
}

}  // namespace simnccl
