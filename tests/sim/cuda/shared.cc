#include "shared.h"

#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace twoshot::sim {
namespace {

constexpr int kProcesses = 1024, kGpusPerHost = 128, kMulticast = 2048, kHolders = 256;

struct Process {
    int pid, host;
    uint64_t bytes[kGpusPerHost];
};
struct MulticastSlot {
    uint64_t id;                 // 0: free
    char domain[48];
    int holders[kHolders];
};
struct Shared {
    pthread_mutex_t mutex;
    uint64_t session_id;
    std::atomic<uint64_t> next_id;
    Process processes[kProcesses];
    MulticastSlot multicast[kMulticast];
};

Shared* shared = nullptr;
Process* self = nullptr;

struct Lock {
    Lock() {
        if (pthread_mutex_lock(&shared->mutex) == EOWNERDEAD) pthread_mutex_consistent(&shared->mutex);
    }
    ~Lock() { pthread_mutex_unlock(&shared->mutex); }
};

void first_use() {
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&shared->mutex, &attr);
    pthread_mutexattr_destroy(&attr);
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    shared->session_id = (uint64_t(now.tv_sec) << 32) ^ (uint64_t(now.tv_nsec) << 8) ^ uint64_t(getpid());
    shared->next_id = 1;
}

// Frees the slots whose holders have all died. Called with the lock held.
void reap_multicast() {
    for (MulticastSlot& slot : shared->multicast) {
        if (!slot.id) continue;
        bool held = false;
        for (int pid : slot.holders) held = held || (pid && process_lives(pid));
        if (!held) slot = {};
    }
}

std::vector<int> parse_visible() {
    int count = int(topology().hosts[session().host].gpus.size());
    std::vector<int> gpus;
    const char* text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) {
        for (int i = 0; i < count; i++) gpus.push_back(i);
        return gpus;
    }
    std::istringstream words(text);
    std::string word;
    while (std::getline(words, word, ',')) {
        char* end = nullptr;
        long index = strtol(word.c_str(), &end, 10);
        if (end == word.c_str() || index < 0 || index >= count) break;   // the driver stops at the first bad one
        gpus.push_back(int(index));
    }
    return gpus;
}

}  // namespace

bool process_lives(int pid) { return kill(pid, 0) == 0 || errno != ESRCH; }

void shared_open() {
    std::string path = session().path("shared");
    int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || flock(fd, LOCK_EX) != 0) die("cannot open %s", path.c_str());
    struct stat st;
    if (fstat(fd, &st) != 0) die("cannot stat %s", path.c_str());
    bool fresh = st.st_size == 0;
    if (fresh && ftruncate(fd, sizeof(Shared)) != 0) die("cannot size %s", path.c_str());
    void* at = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) die("cannot map %s", path.c_str());
    shared = static_cast<Shared*>(at);
    if (fresh) first_use();
    for (Process& p : shared->processes) {
        if (p.pid != 0 && process_lives(p.pid)) continue;
        p = {};
        p.pid = getpid();
        p.host = session().host;
        self = &p;
        break;
    }
    flock(fd, LOCK_UN);
    close(fd);
    if (!self) die("more than %d processes in one session", kProcesses);
}

uint64_t shared_next_id() { return shared->next_id++; }
uint64_t shared_session_id() { return shared->session_id; }

const std::vector<int>& visible_gpus() {
    static const auto* once = new std::vector<int>(parse_visible());
    return *once;
}

GpuId visible_gpu(int ordinal) { return {session().host, visible_gpus()[ordinal]}; }

int ordinal_of(GpuId id) {
    if (id.host != session().host) return -1;
    const auto& gpus = visible_gpus();
    for (size_t i = 0; i < gpus.size(); i++)
        if (gpus[i] == id.gpu) return int(i);
    return -1;
}

static uint64_t used_locked(GpuId id) {
    uint64_t sum = 0;
    for (const Process& p : shared->processes)
        if (p.pid && p.host == id.host && p.bytes[id.gpu] && process_lives(p.pid)) sum += p.bytes[id.gpu];
    return sum;
}

uint64_t gpu_bytes_used(GpuId id) {
    Lock lock;
    return used_locked(id);
}

bool gpu_charge(GpuId id, uint64_t bytes) {
    Lock lock;
    uint64_t used = used_locked(id), total = topology().gpu(id).mem;
    if (bytes > total || used > total - bytes) return false;
    self->bytes[id.gpu] += bytes;
    return true;
}

void gpu_refund(GpuId id, uint64_t bytes) {
    Lock lock;
    self->bytes[id.gpu] -= bytes;
}

bool multicast_claim(uint64_t id) {
    std::string domain = topology().domain(session().host);
    Lock lock;
    reap_multicast();
    int used = 0;
    MulticastSlot* open = nullptr;
    for (MulticastSlot& slot : shared->multicast) {
        if (!slot.id) open = open ? open : &slot;
        else if (domain == slot.domain) used++;
    }
    if (used >= topology().mc_slots || !open) return false;
    open->id = id;
    strncpy(open->domain, domain.c_str(), sizeof open->domain - 1);
    open->holders[0] = getpid();
    return true;
}

void multicast_join(uint64_t id) {
    Lock lock;
    for (MulticastSlot& slot : shared->multicast) {
        if (slot.id != id) continue;
        for (int& pid : slot.holders) {
            if (pid && pid != getpid() && process_lives(pid)) continue;
            pid = getpid();
            return;
        }
        die("more than %d processes share one multicast object", kHolders);
    }
}

void multicast_leave(uint64_t id) {
    Lock lock;
    for (MulticastSlot& slot : shared->multicast) {
        if (slot.id != id) continue;
        for (int& pid : slot.holders)
            if (pid == getpid()) pid = 0;
    }
    reap_multicast();
}

}  // namespace twoshot::sim
