// Stream capture: what a stream records instead of doing it.
#pragma once

#include "graph.h"
#include "streams.h"

#include <thread>

namespace twoshot::sim {

struct Capture {
    uint64_t id;
    CUstreamCaptureMode mode;
    Stream* origin;
    std::thread::id thread;
    CUgraph handle;
    std::shared_ptr<Graph> graph;
    bool invalid = false;
    std::vector<Stream*> members;          // streams that record into it, the origin included
};

// Guards every capture, the capture fields of streams and events, and graphs
// while they are recorded.
std::mutex& capture_mutex();

// A captured event: where in which capture it was recorded.
struct CapturedPoint {
    std::weak_ptr<Capture> capture;
    std::vector<Node*> tips;
};

// Records work into the stream's capture; `captured` stays false when the
// stream is not captured.
CUresult capture_work(Stream& stream, const char* kind, const std::function<void()>& work, bool* captured);
CUresult capture_refuses_wait(Stream& stream);      // cuStreamSynchronize, cuStreamQuery
CUresult capture_refuses_unsafe_call();             // by the thread's mode and all captures under way
void capture_forget(Stream& stream);                // the stream is being destroyed

// Event record and wait in a captured stream. `captured` as above.
CUresult capture_record(Stream& stream, CapturedPoint* point, bool* captured);
CUresult capture_wait(Stream& stream, const CapturedPoint* point, bool* captured);
CUresult capture_refuses_event(const CapturedPoint& point);   // query or wait on the host

}  // namespace twoshot::sim
