// User objects: a destructor of the program's that runs once nobody refers to
// the object any more, on a thread of the driver's, where no call of the driver
// is allowed.
#include "capture.h"
#include "graph.h"
#include "handles.h"
#include "stats.h"
#include "threads.h"

#include <deque>

namespace twoshot::sim {

struct UserObject {
    void* ptr;
    CUhostFn destroy;
    unsigned references;
};

std::shared_ptr<Graph> graph_find(CUgraph handle);

namespace {

std::mutex& references_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}
Handles<CUuserObject, UserObject>& objects() {
    static auto* handles = new Handles<CUuserObject, UserObject>(0x55);
    return *handles;
}

struct Reaper {
    std::mutex mutex;
    std::deque<std::shared_ptr<UserObject>> dead;
    bool running = false;
};
Reaper& reaper() {
    static auto* one = new Reaper;
    return *one;
}

void reap() {
    Reaper& r = reaper();
    std::unique_lock<std::mutex> lock(r.mutex);
    while (!r.dead.empty()) {
        auto object = r.dead.front();
        r.dead.pop_front();
        lock.unlock();
        {
            CallbackScope callback;
            object->destroy(object->ptr);
        }
        stats::live(stats::kUserObjects, -1);
        lock.lock();
    }
    r.running = false;
}

bool give_back(const std::shared_ptr<UserObject>& object, unsigned count) {
    {
        std::lock_guard<std::mutex> lock(references_mutex());
        if (object->references < count) return false;
        object->references -= count;
        if (object->references) return true;
    }
    Reaper& r = reaper();
    std::lock_guard<std::mutex> lock(r.mutex);
    r.dead.push_back(object);
    if (!r.running) {
        r.running = true;
        pthread_detach(start_thread(reap));
    }
    return true;
}

}  // namespace

UserReferences::UserReferences(const UserReferences& other) : held_(other.held_) {
    std::lock_guard<std::mutex> lock(references_mutex());
    for (auto& [object, count] : held_) object->references += count;
}

UserReferences::~UserReferences() {
    for (auto& [object, count] : held_) give_back(object, count);
}

void UserReferences::take(std::shared_ptr<UserObject> object, unsigned count) {
    held_.emplace_back(std::move(object), count);
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuUserObjectCreate(CUuserObject* object, void* ptr, CUhostFn destroy, unsigned int references,
                            unsigned int flags) {
    SIM_ENTRY(0);
    if (!object || !destroy || !references || flags != CU_USER_OBJECT_NO_DESTRUCTOR_SYNC) return CUDA_ERROR_INVALID_VALUE;
    *object = objects().add(std::make_shared<UserObject>(UserObject{ptr, destroy, references}));
    stats::live(stats::kUserObjects, 1);
    return CUDA_SUCCESS;
}

CUresult cuUserObjectRelease(CUuserObject handle, unsigned int count) {
    SIM_ENTRY(0);
    auto object = objects().find(handle);
    if (!object || !count) return CUDA_ERROR_INVALID_VALUE;
    return give_back(object, count) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGraphRetainUserObject(CUgraph handle, CUuserObject object_handle, unsigned int count, unsigned int flags) {
    SIM_ENTRY(0);
    auto graph = graph_find(handle);
    auto object = objects().find(object_handle);
    if (!graph || !object || !count || (flags & ~unsigned(CU_GRAPH_USER_OBJECT_MOVE))) return CUDA_ERROR_INVALID_VALUE;
    {
        std::lock_guard<std::mutex> lock(references_mutex());
        if (object->references == 0) return CUDA_ERROR_INVALID_VALUE;
        if (flags == CU_GRAPH_USER_OBJECT_MOVE && object->references < count) return CUDA_ERROR_INVALID_VALUE;
        if (flags != CU_GRAPH_USER_OBJECT_MOVE) object->references += count;
    }
    std::lock_guard<std::mutex> lock(capture_mutex());
    graph->objects.take(object, count);
    return CUDA_SUCCESS;
}
