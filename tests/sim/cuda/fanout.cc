// Stores to multicast addresses: each is delivered to the memory of every
// device bound at that place, whichever process it belongs to; and loads that
// reduce, which read all of them. Any other access to such an address ends the
// process with a report.
#include "faults.h"
#include "multicast.h"
#include "session.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <map>
#include <vector>

namespace twoshot::sim {
namespace {

// Where the bytes of an object go, as of one serial of its bindings.
struct View {
    uint64_t serial;
    struct Target {
        uint64_t offset, size;
        char* at;
    };
    std::vector<Target> targets;
};

struct Watch {
    uint64_t address, bytes;
    MulticastShared* object;
    std::atomic<bool> writable{false};
    std::atomic<const View*> view{nullptr};
    std::map<uint64_t, View::Target> opened;     // by binding serial
    std::vector<const View*> views;
};

using Watches = std::vector<Watch*>;
std::atomic<const Watches*> watches{nullptr};    // replaced as a whole, so that stores and the handler need no lock

// Guards opened and views of all watches. Lists replaced earlier stay readable
// for a store in flight; they are few.
std::mutex& view_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}
std::vector<const Watches*>& retired() {
    static auto* all = new std::vector<const Watches*>;
    return *all;
}

struct sigaction previous;

Watch* watch_of(uint64_t address) {
    const Watches* all = watches.load(std::memory_order_acquire);
    if (all)
        for (Watch* w : *all)
            if (address - w->address < w->bytes) return w;
    return nullptr;
}

void on_fault(int signal, siginfo_t* info, void* context) {
    if (watch_of(uint64_t(info->si_addr))) {
        dprintf(2, "twoshot-sim: ordinary access to multicast address %p\n", info->si_addr);
        abort();
    }
    if ((previous.sa_flags & SA_SIGINFO) && previous.sa_sigaction) {
        previous.sa_sigaction(signal, info, context);
        return;
    }
    sigaction(SIGSEGV, &previous, nullptr);       // the access repeats and meets who was there before
}

const View* rebuild(Watch* w) {
    std::lock_guard<std::mutex> guard(view_mutex());
    MulticastLock lock(w->object);
    uint64_t serial = w->object->serial;
    const View* current = w->view;
    if (current && current->serial == serial) return current;
    auto* view = new View{serial, {}};
    std::map<uint64_t, View::Target> still;
    for (const MulticastBinding& b : w->object->bindings) {
        if (!b.serial) continue;
        auto known = w->opened.find(b.serial);
        if (known == w->opened.end()) {
            int fd = open(file_of(Kind::memory, b.memory_id).c_str(), O_RDWR | O_CLOEXEC);
            if (fd < 0) die("memory bound to a multicast object is gone");
            void* at = mmap(nullptr, b.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, off_t(b.memory_offset));
            close(fd);
            if (at == MAP_FAILED) die("cannot map memory bound to a multicast object");
            known = w->opened.insert({b.serial, {b.offset, b.size, static_cast<char*>(at)}}).first;
        }
        still.insert(*known);
        view->targets.push_back(known->second);
    }
    for (auto& [key, target] : w->opened)
        if (!still.count(key)) munmap(target.at, target.size);
    w->opened = std::move(still);
    w->views.push_back(view);
    w->view = view;
    return view;
}

void replace(const Watches* next) {
    const Watches* old = watches.exchange(next, std::memory_order_acq_rel);
    if (old) retired().push_back(old);
}

}  // namespace

void multicast_watch(uint64_t address, uint64_t bytes, MulticastShared* object) {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &previous);
    });
    std::lock_guard<std::mutex> guard(view_mutex());
    const Watches* old = watches;
    auto* next = old ? new Watches(*old) : new Watches;
    auto* w = new Watch;
    w->address = address;
    w->bytes = bytes;
    w->object = object;
    next->push_back(w);
    replace(next);
}

void multicast_allow(uint64_t address, bool write) {
    if (Watch* w = watch_of(address)) w->writable = write;
}

void multicast_unwatch(uint64_t address) {
    std::lock_guard<std::mutex> guard(view_mutex());
    Watch* w = watch_of(address);
    auto* next = new Watches;
    for (Watch* other : *watches.load())
        if (other != w) next->push_back(other);
    replace(next);
    for (auto& entry : w->opened) munmap(entry.second.at, entry.second.size);
    for (const View* view : w->views) delete view;
    delete w;
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

// Calls `each` with the memory of every device that is bound at this line.
template <typename Each>
static uint32_t at_line(uint64_t va, const char* what, Each each) {
    Watch* w = watch_of(va);
    if (!w) die("multimem %s %#llx, which is no multicast address", what, static_cast<unsigned long long>(va));
    if (!w->writable) die("multimem %s %#llx, which has no access", what, static_cast<unsigned long long>(va));
    if (va % 16) die("multimem %s %#llx, which is not aligned", what, static_cast<unsigned long long>(va));
    const View* view = w->view.load(std::memory_order_acquire);
    if (!view || view->serial != w->object->serial.load(std::memory_order_acquire)) view = rebuild(w);
    uint64_t offset = va - w->address;
    uint32_t reached = 0;
    for (const View::Target& t : view->targets)
        if (offset - t.offset < t.size) each(reinterpret_cast<uint32_t*>(t.at + (offset - t.offset)), reached++);
    if (reached != w->object->expected)
        die("multimem %s %#llx: %u of %u devices are bound there", what, static_cast<unsigned long long>(va), reached,
            w->object->expected);
    return reached;
}

// multimem.st of one 16-byte line, relaxed: each word is stored atomically.
extern "C" __attribute__((visibility("default"))) void twoshot_sim_multimem_store(uint64_t va, const uint32_t words[4]) {
    static const bool faulty = faults::watches("twoshot_sim_multimem_store");
    if (faulty && faults::apply("twoshot_sim_multimem_store")) return;   // lost in the switch
    at_line(va, "store to", [words](uint32_t* to, uint32_t) {
        for (int i = 0; i < 4; i++) __atomic_store_n(to + i, words[i], __ATOMIC_RELAXED);
    });
}

// What multimem.ld_reduce adds up: the line of every device's memory, each word loaded atomically.
extern "C" __attribute__((visibility("default"))) unsigned twoshot_sim_multimem_load(uint64_t va, uint32_t words[][4],
                                                                                     unsigned most) {
    static const bool faulty = faults::watches("twoshot_sim_multimem_load");
    bool lost = faulty && faults::apply("twoshot_sim_multimem_load");    // one memory is left out
    return at_line(va, "load from", [words, most, lost](const uint32_t* from, uint32_t index) {
        if (index >= most) die("a multimem load from more than %u devices", most);
        for (int i = 0; i < 4; i++)
            words[index][i] = lost && index == 0 ? 0 : __atomic_load_n(from + i, __ATOMIC_ACQUIRE);
    });
}
