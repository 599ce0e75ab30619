#include "capture.h"

#include "session.h"
#include "stats.h"

#include <algorithm>
#include <atomic>

namespace twoshot::sim {
namespace {

// Captures under way. Guarded by capture_mutex; the count alone is read without,
// so that nothing is locked while nobody captures.
std::vector<std::shared_ptr<Capture>>& active() {
    static auto* all = new std::vector<std::shared_ptr<Capture>>;
    return *all;
}
std::atomic<int> under_way{0};
uint64_t next_id = 1;
thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

CUresult spoil(Capture& capture, CUresult why) {
    capture.invalid = true;
    return why;
}

// Takes the capture away from all its streams.
void finish(const std::shared_ptr<Capture>& capture) {
    for (Stream* s : capture->members) {
        s->capture.reset();
        s->tips.clear();
    }
    auto& all = active();
    all.erase(std::remove(all.begin(), all.end(), capture), all.end());
    under_way = int(all.size());
}

void add_tip(Stream& stream, Node* node) {
    if (std::find(stream.tips.begin(), stream.tips.end(), node) == stream.tips.end()) stream.tips.push_back(node);
}

// True when everything the other streams recorded leads to the origin's tips.
bool joined(const Capture& capture) {
    std::vector<const Node*> reached, open(capture.origin->tips.begin(), capture.origin->tips.end());
    while (!open.empty()) {
        const Node* n = open.back();
        open.pop_back();
        if (std::find(reached.begin(), reached.end(), n) != reached.end()) continue;
        reached.push_back(n);
        open.insert(open.end(), n->after.begin(), n->after.end());
    }
    for (const Stream* s : capture.members)
        for (const Node* tip : s->tips)
            if (s != capture.origin && std::find(reached.begin(), reached.end(), tip) == reached.end()) return false;
    return true;
}

}  // namespace

std::mutex& capture_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

CUresult capture_work(Stream& stream, const char* kind, const std::function<void()>& work, bool* captured) {
    if (!under_way) return CUDA_SUCCESS;
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (!stream.capture) return CUDA_SUCCESS;
    *captured = true;
    if (stream.capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    Node* node = stream.capture->graph->add(kind, work, stream.tips);
    stream.tips = {node};
    return CUDA_SUCCESS;
}

CUresult capture_refuses_wait(Stream& stream) {
    if (!under_way) return CUDA_SUCCESS;
    if (stream.legacy) return legacy_refuses(stream.context, true);
    std::lock_guard<std::mutex> lock(capture_mutex());
    return stream.capture ? spoil(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) : CUDA_SUCCESS;
}

CUresult legacy_refuses(CUcontext context, bool spoils) {
    if (!under_way) return CUDA_SUCCESS;
    std::lock_guard<std::mutex> lock(capture_mutex());
    CUresult result = CUDA_SUCCESS;
    for (auto& capture : active())
        for (Stream* s : capture->members)
            if (s->context == context && s->blocking) {
                result = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
                capture->invalid = capture->invalid || spoils;
            }
    return result;
}

CUresult capture_refuses_unsafe_call() {
    if (!under_way || thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
    std::lock_guard<std::mutex> lock(capture_mutex());
    CUresult result = CUDA_SUCCESS;
    for (auto& capture : active()) {
        bool own = capture->thread == std::this_thread::get_id() && capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED;
        bool other = thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL && capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (own || other) result = spoil(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    return result;
}

void capture_forget(Stream& stream) {
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (!stream.capture) return;
    auto capture = stream.capture;
    if (capture->origin != &stream) {
        capture->invalid = true;
        auto& members = capture->members;
        members.erase(std::remove(members.begin(), members.end(), &stream), members.end());
        stream.capture.reset();
        return;
    }
    finish(capture);
    graph_discard(capture->handle);
}

CUresult capture_record(Stream& stream, CapturedPoint* point, bool* captured) {
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (!stream.capture) return CUDA_SUCCESS;
    *captured = true;
    if (stream.capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    point->capture = stream.capture;
    point->tips = stream.tips;
    return CUDA_SUCCESS;
}

CUresult capture_wait(Stream& stream, const CapturedPoint* point, bool* captured) {
    if (!under_way && !point) return CUDA_SUCCESS;
    std::lock_guard<std::mutex> lock(capture_mutex());
    std::shared_ptr<Capture> from = point ? point->capture.lock() : nullptr;
    if (!from && !stream.capture) return point ? CUDA_ERROR_CAPTURED_EVENT : CUDA_SUCCESS;
    *captured = true;
    if (stream.capture && stream.capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (!from) return spoil(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    if (from->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (stream.legacy) return spoil(*from, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    if (stream.capture && stream.capture != from) {
        spoil(*stream.capture, CUDA_SUCCESS);
        return spoil(*from, CUDA_ERROR_STREAM_CAPTURE_MERGE);
    }
    if (!stream.capture) {
        stream.capture = from;
        stream.tips.clear();
        from->members.push_back(&stream);
    }
    for (Node* tip : point->tips) add_tip(stream, tip);
    return CUDA_SUCCESS;
}

CUresult capture_refuses_event(const CapturedPoint& point) {
    std::lock_guard<std::mutex> lock(capture_mutex());
    auto capture = point.capture.lock();
    if (capture) spoil(*capture, CUDA_SUCCESS);
    return CUDA_ERROR_CAPTURED_EVENT;
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    SIM_ENTRY(0);
    if (!mode || *mode < 0 || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, thread_mode);
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    SIM_ENTRY(0);
    std::shared_ptr<Stream> stream;
    if (mode < 0 || mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = find_stream(handle, &stream)) return r;
    if (stream->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    auto capture = std::make_shared<Capture>();
    capture->id = next_id++;
    capture->mode = mode;
    capture->origin = stream.get();
    capture->thread = std::this_thread::get_id();
    capture->handle = graph_new(&capture->graph);
    capture->members = {stream.get()};
    stream->capture = capture;
    stream->tips.clear();
    active().push_back(capture);
    under_way = int(active().size());
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    SIM_ENTRY(0);
    std::shared_ptr<Stream> stream;
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    *graph = nullptr;
    if (CUresult r = find_stream(handle, &stream)) return r;
    std::lock_guard<std::mutex> lock(capture_mutex());
    std::shared_ptr<Capture> capture = stream->capture;
    if (!capture) return CUDA_ERROR_ILLEGAL_STATE;
    if (capture->origin != stream.get()) return spoil(*capture, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id())
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    CUresult result = capture->invalid   ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
                      : !joined(*capture) ? CUDA_ERROR_STREAM_CAPTURE_UNJOINED
                                          : CUDA_SUCCESS;
    finish(capture);
    if (result == CUDA_SUCCESS) *graph = capture->handle;
    else graph_discard(capture->handle);
    return result;
}

static CUresult status_of(CUstream handle, CUstreamCaptureStatus* status, std::shared_ptr<Stream>* stream) {
    if (!status) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = find_stream(handle, stream)) return r;
    if ((*stream)->legacy)
        if (CUresult r = legacy_refuses((*stream)->context, false)) return r;
    return CUDA_SUCCESS;
}

// Wants capture_mutex.
static CUstreamCaptureStatus status_now(const Stream& stream) {
    if (!stream.capture) return CU_STREAM_CAPTURE_STATUS_NONE;
    return stream.capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    SIM_ENTRY(0);
    std::shared_ptr<Stream> stream;
    if (CUresult r = status_of(handle, status, &stream)) return r;
    std::lock_guard<std::mutex> lock(capture_mutex());
    *status = status_now(*stream);
    return CUDA_SUCCESS;
}

static CUresult info(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                     const CUgraphNode** dependencies, const CUgraphEdgeData** edges, size_t* count) {
    std::shared_ptr<Stream> stream;
    if (CUresult r = status_of(handle, status, &stream)) return r;
    std::lock_guard<std::mutex> lock(capture_mutex());
    *status = status_now(*stream);
    if (*status != CU_STREAM_CAPTURE_STATUS_ACTIVE) return CUDA_SUCCESS;
    stream->shown_tips.clear();
    for (Node* tip : stream->tips) stream->shown_tips.push_back(reinterpret_cast<CUgraphNode>(tip));
    stream->shown_edges.assign(stream->tips.size(), CUgraphEdgeData{});
    if (id) *id = stream->capture->id;
    if (graph) *graph = stream->capture->handle;
    if (dependencies) *dependencies = stream->shown_tips.data();
    if (edges) *edges = stream->shown_edges.data();
    if (count) *count = stream->shown_tips.size();
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                                   const CUgraphNode** dependencies, size_t* count) {
    SIM_ENTRY(0);
    return info(stream, status, id, graph, dependencies, nullptr, count);
}

CUresult cuStreamGetCaptureInfo_v3(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                                   const CUgraphNode** dependencies, const CUgraphEdgeData** edges, size_t* count) {
    SIM_ENTRY(0);
    return info(stream, status, id, graph, dependencies, edges, count);
}

static CUresult update(CUstream handle, CUgraphNode* nodes, size_t count, unsigned flags) {
    std::shared_ptr<Stream> stream;
    if (flags > CU_STREAM_SET_CAPTURE_DEPENDENCIES || (count && !nodes)) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = find_stream(handle, &stream)) return r;
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (!stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    for (size_t i = 0; i < count; i++)
        if (!stream->capture->graph->holds(reinterpret_cast<Node*>(nodes[i]))) return CUDA_ERROR_INVALID_VALUE;
    if (flags == CU_STREAM_SET_CAPTURE_DEPENDENCIES) stream->tips.clear();
    for (size_t i = 0; i < count; i++) add_tip(*stream, reinterpret_cast<Node*>(nodes[i]));
    return CUDA_SUCCESS;
}

CUresult cuStreamUpdateCaptureDependencies(CUstream stream, CUgraphNode* dependencies, size_t count,
                                           unsigned int flags) {
    SIM_ENTRY(0);
    return update(stream, dependencies, count, flags);
}

CUresult cuStreamUpdateCaptureDependencies_v2(CUstream stream, CUgraphNode* dependencies, const CUgraphEdgeData*,
                                              size_t count, unsigned int flags) {
    SIM_ENTRY(0);
    return update(stream, dependencies, count, flags);
}
