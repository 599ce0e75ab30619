// Streams: a queue of work each, done in order by the stream's own thread, which
// starts with the first piece of work.
#pragma once

#include "context.h"
#include "sim.h"

#include <atomic>
#include <pthread.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace twoshot::sim {

struct Capture;
struct Node;

class Stream : public std::enable_shared_from_this<Stream> {
public:
    Stream(CUcontext context, bool blocking, bool legacy) : context(context), blocking(blocking), legacy(legacy) {}

    const CUcontext context;
    const bool blocking;      // ordered with the legacy stream
    const bool legacy;
    const uint64_t number = next_number();  // no other stream has had it

    // What this stream records while it is captured. Guarded by capture_mutex.
    std::shared_ptr<Capture> capture;
    std::vector<Node*> tips;                        // what the next piece of work depends on
    std::vector<CUgraphNode> shown_tips;            // as last handed out
    std::vector<CUgraphEdgeData> shown_edges;

    void submit(std::function<void()> work);
    bool idle();
    void wait_idle();
    void close();             // ends the thread once the queue is empty

private:
    static uint64_t next_number() {
        static std::atomic<uint64_t> next{1};
        return next++;
    }
    struct Work {
        std::function<void()> run;
        std::vector<std::pair<std::shared_ptr<Stream>, uint64_t>> after;
    };
    void serve();
    void wait_for(uint64_t ticket);
    bool pending(uint64_t* last);

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Work> queue_;
    uint64_t submitted_ = 0, completed_ = 0;
    bool started_ = false, closing_ = false;
    pthread_t thread_{};
};

// The stream a handle means for this thread.
CUresult find_stream(CUstream handle, std::shared_ptr<Stream>* stream);

// Puts work on a stream, or into the graph the stream is being captured to.
CUresult put(CUstream handle, const char* kind, std::function<void()> work);

// Refuses, and on demand spoils the capture, while a stream that the legacy one
// would have to wait for is captured.
CUresult legacy_refuses(CUcontext context, bool spoils);

void drain(CUcontext context);             // all streams
void drain_blocking(CUcontext context);    // the legacy stream and those ordered with it

// A point of a stream's work.
struct Marker {
    std::mutex mutex;
    std::condition_variable reached;
    bool done = false;
    int64_t nanoseconds = 0;
    void set();
    void wait();
    bool is_done();
};

}  // namespace twoshot::sim
