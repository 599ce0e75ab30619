#include "stats.h"

#include "session.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <mutex>

namespace twoshot::sim::stats {
namespace {

struct Slot {
    char name[kNameBytes];
    std::atomic<uint64_t> value;
};
static_assert(sizeof(Slot) == 64, "the harness reads 64-byte slots");

Slot early[kSlots];
std::atomic<Slot*> table{early};
std::mutex& naming() {
    static std::mutex* mutex = new std::mutex;
    return *mutex;
}

const char* const live_names[kLiveCount] = {
    "allocations", "imports", "mappings", "mapped_bytes", "reservations", "reserved_bytes", "fds",
    "multicast_objects", "multicast_imports", "multicast_bindings",
    "streams", "events", "modules", "device_allocations", "device_bytes", "host_allocations", "contexts",
    "user_objects", "graphs", "graph_execs", "nvml_inits", "repeated_modules",
};
const char* const total_names[kTotalCount] = {
    "fabric_orphans", "lazy_loads", "calls_after_exit", "launches", "graph_launches",
};

// Index of every enumerated slot, found once.
struct Known {
    unsigned live[kLiveCount], sum[kLiveCount], total[kTotalCount];
    Known() {
        char name[kNameBytes];
        auto join = [&](const char* kind, const char* what) {
            std::strcpy(name, kind);
            std::strcat(name, what);
            return slot(name);
        };
        for (unsigned i = 0; i < kLiveCount; i++) {
            live[i] = join("live.", live_names[i]);
            sum[i] = join("total.", live_names[i]);
        }
        for (unsigned i = 0; i < kTotalCount; i++) total[i] = join("total.", total_names[i]);
    }
};
const Known& known() {
    static const Known* once = new Known;
    return *once;
}

}  // namespace

unsigned slot(const char* name) {
    std::lock_guard<std::mutex> lock(naming());
    Slot* slots = table.load();
    for (unsigned i = 0; i < kSlots; i++) {
        if (slots[i].name[0] == 0) {
            std::strncpy(slots[i].name, name, kNameBytes - 1);
            return i;
        }
        if (std::strncmp(slots[i].name, name, kNameBytes - 1) == 0) return i;
    }
    die("the statistics table is full at %s", name);
}

void bump(unsigned index, int64_t by) {
    table.load(std::memory_order_relaxed)[index].value.fetch_add(uint64_t(by), std::memory_order_relaxed);
}

void live(Live what, int64_t by) {
    bump(known().live[what], by);
    if (by > 0) bump(known().sum[what], by);
}

void set_live(Live what, uint64_t value) {
    table.load()[known().live[what]].value.store(value);
}

void total(Total what, int64_t by) { bump(known().total[what], by); }

void open_file(const char* path) {
    known();
    std::lock_guard<std::mutex> lock(naming());
    if (table.load() != early) return;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof early) != 0) die("cannot create %s", path);
    void* at = mmap(nullptr, sizeof early, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at == MAP_FAILED) die("cannot map %s", path);
    Slot* slots = static_cast<Slot*>(at);
    for (unsigned i = 0; i < kSlots && early[i].name[0]; i++) {
        std::memcpy(slots[i].name, early[i].name, kNameBytes);
        slots[i].value.store(early[i].value.load());
    }
    table.store(slots);
}

}  // namespace twoshot::sim::stats
