// Events: a marker in a stream's work, or a point of a capture.
#include "capture.h"
#include "handles.h"
#include "stats.h"
#include "streams.h"

namespace twoshot::sim {
namespace {

struct Event {
    CUcontext context;
    bool timed;
    std::mutex mutex;
    std::shared_ptr<Marker> marker;            // of the last record; null before the first
    std::shared_ptr<CapturedPoint> point;      // set while the last record was captured
};

Handles<CUevent, Event>& events() {
    static auto* handles = new Handles<CUevent, Event>(0x52);
    return *handles;
}

// What the last record left, or the error that a captured event means.
CUresult recorded(CUevent handle, std::shared_ptr<Event>* event, std::shared_ptr<Marker>* marker) {
    *event = events().find(handle);
    if (!*event) return CUDA_ERROR_INVALID_HANDLE;
    std::shared_ptr<CapturedPoint> point;
    {
        std::lock_guard<std::mutex> lock((*event)->mutex);
        *marker = (*event)->marker;
        point = (*event)->point;
    }
    return point ? capture_refuses_event(*point) : CUDA_SUCCESS;
}

}  // namespace
}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuEventCreate(CUevent* event, unsigned int flags) {
    SIM_ENTRY(0);
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    if (!event || (flags & ~unsigned(CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING))) return CUDA_ERROR_INVALID_VALUE;
    auto made = std::make_shared<Event>();
    made->context = context;
    made->timed = !(flags & CU_EVENT_DISABLE_TIMING);
    *event = events().add(std::move(made));
    stats::live(stats::kEvents, 1);
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent handle) {
    SIM_ENTRY(0);
    if (!events().remove(handle)) return CUDA_ERROR_INVALID_HANDLE;
    stats::live(stats::kEvents, -1);
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
    SIM_ENTRY(0);
    auto event = events().find(handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    std::shared_ptr<Stream> stream;
    if (CUresult r = find_stream(stream_handle, &stream)) return r;
    if (stream->context != event->context) return CUDA_ERROR_INVALID_HANDLE;
    auto point = std::make_shared<CapturedPoint>();
    bool captured = false;
    if (CUresult r = capture_record(*stream, point.get(), &captured)) return r;
    auto marker = captured ? nullptr : std::make_shared<Marker>();
    {
        std::lock_guard<std::mutex> lock(event->mutex);
        event->marker = marker;
        event->point = captured ? point : nullptr;
    }
    return captured ? CUDA_SUCCESS : put(stream_handle, "record", [marker] { marker->set(); });
}

CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned int flags) {
    SIM_ENTRY(0);
    if (flags & ~1u) return CUDA_ERROR_INVALID_VALUE;
    auto event = events().find(handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    std::shared_ptr<Stream> stream;
    if (CUresult r = find_stream(stream_handle, &stream)) return r;
    std::shared_ptr<Marker> marker;
    std::shared_ptr<CapturedPoint> point;
    {
        std::lock_guard<std::mutex> lock(event->mutex);
        marker = event->marker;
        point = event->point;
    }
    bool captured = false;
    if (CUresult r = capture_wait(*stream, point.get(), &captured)) return r;
    if (captured || !marker) return CUDA_SUCCESS;
    return put(stream_handle, "wait", [marker] { marker->wait(); });
}

CUresult cuEventQuery(CUevent handle) {
    SIM_ENTRY(kUnsafe);
    std::shared_ptr<Event> event;
    std::shared_ptr<Marker> marker;
    if (CUresult r = recorded(handle, &event, &marker)) return r;
    return !marker || marker->is_done() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(CUevent handle) {
    SIM_ENTRY(kUnsafe);
    std::shared_ptr<Event> event;
    std::shared_ptr<Marker> marker;
    if (CUresult r = recorded(handle, &event, &marker)) return r;
    if (marker) marker->wait();
    return CUDA_SUCCESS;
}

static CUresult elapsed(float* milliseconds, CUevent from, CUevent to) {
    std::shared_ptr<Event> a, b;
    std::shared_ptr<Marker> x, y;
    if (!milliseconds) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = recorded(from, &a, &x)) return r;
    if (CUresult r = recorded(to, &b, &y)) return r;
    if (!a->timed || !b->timed || !x || !y) return CUDA_ERROR_INVALID_HANDLE;
    if (!x->is_done() || !y->is_done()) return CUDA_ERROR_NOT_READY;
    *milliseconds = float(double(y->nanoseconds - x->nanoseconds) / 1e6);
    return CUDA_SUCCESS;
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
    SIM_ENTRY(0);
    return elapsed(milliseconds, from, to);
}

CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent from, CUevent to) {
    SIM_ENTRY(0);
    return elapsed(milliseconds, from, to);
}
