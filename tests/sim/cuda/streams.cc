#include "streams.h"

#include "capture.h"
#include "handles.h"
#include "session.h"
#include "stats.h"
#include "threads.h"

#include <time.h>

#include <algorithm>
#include <map>

namespace twoshot::sim {
namespace {

Handles<CUstream, Stream>& table() {
    // As real handles do, these come again where TWOSHOT_SIM_REUSE_STREAMS asks for it.
    static auto* handles = new Handles<CUstream, Stream>(0x51, getenv("TWOSHOT_SIM_REUSE_STREAMS") != nullptr);
    return *handles;
}

// Streams of the context that are still there.
std::vector<std::shared_ptr<Stream>> live_streams(CUcontext context) {
    std::vector<std::shared_ptr<Stream>> live;
    std::lock_guard<std::mutex> lock(context->mutex);
    auto& all = context->streams;
    all.erase(std::remove_if(all.begin(), all.end(), [](auto& s) { return s.expired(); }), all.end());
    for (auto& weak : all)
        if (auto s = weak.lock()) live.push_back(s);
    return live;
}

std::shared_ptr<Stream> make(CUcontext context, bool blocking, bool legacy) {
    auto stream = std::make_shared<Stream>(context, blocking, legacy);
    context->streams.push_back(stream);
    return stream;
}

std::shared_ptr<Stream> legacy_of(CUcontext context) {
    std::lock_guard<std::mutex> lock(context->mutex);
    if (!context->legacy) context->legacy = make(context, false, true);
    return context->legacy;
}

// The calling thread's own default streams.
struct PerThread {
    std::map<CUcontext, std::shared_ptr<Stream>> streams;
    ~PerThread() {
        for (auto& entry : streams) entry.second->close();
    }
};
thread_local PerThread per_thread;

}  // namespace

void Marker::set() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    std::lock_guard<std::mutex> lock(mutex);
    nanoseconds = int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
    done = true;
    reached.notify_all();
}
void Marker::wait() {
    std::unique_lock<std::mutex> lock(mutex);
    reached.wait(lock, [&] { return done; });
}
bool Marker::is_done() {
    std::lock_guard<std::mutex> lock(mutex);
    return done;
}

bool Stream::pending(uint64_t* last) {
    std::lock_guard<std::mutex> lock(mutex_);
    *last = submitted_;
    return completed_ != submitted_;
}

void Stream::submit(std::function<void()> run) {
    // Held throughout, so that the order between the legacy stream and the
    // others is the order of submission.
    std::lock_guard<std::mutex> order(context->mutex);
    Work work{std::move(run), {}};
    uint64_t last;
    if (legacy) {
        for (auto& weak : context->streams)
            if (auto s = weak.lock(); s && s->blocking && s->pending(&last)) work.after.push_back({s, last});
    } else if (blocking && context->legacy && context->legacy->pending(&last)) {
        work.after.push_back({context->legacy, last});
    }
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    submitted_++;
    if (!started_) {
        started_ = true;
        thread_ = start_thread([self = shared_from_this()] { self->serve(); });
    }
    wake_.notify_one();
}

void Stream::serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [&] { return !queue_.empty() || closing_; });
        if (queue_.empty()) return;
        Work work = std::move(queue_.front());
        queue_.pop_front();
        lock.unlock();
        for (auto& [stream, ticket] : work.after) stream->wait_for(ticket);
        work.run();
        work = {};                                   // what it held is let go before anyone is told
        lock.lock();
        completed_++;
        done_.notify_all();
    }
}

void Stream::wait_for(uint64_t ticket) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return completed_ >= ticket; });
}

bool Stream::idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return completed_ == submitted_;
}

void Stream::wait_idle() {
    uint64_t last;
    if (pending(&last)) wait_for(last);
}

void Stream::close() {
    bool join = false;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!started_ || closing_) return;
        closing_ = true;
        join = completed_ == submitted_ && !pthread_equal(pthread_self(), thread_);
        wake_.notify_one();
    }
    if (join) pthread_join(thread_, nullptr);
    else pthread_detach(thread_);
}

CUresult find_stream(CUstream handle, std::shared_ptr<Stream>* stream) {
    if (handle == nullptr || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD) {
        CUcontext context;
        if (CUresult r = current_context(&context)) return r;
        if (handle != CU_STREAM_PER_THREAD) {
            *stream = legacy_of(context);
            return CUDA_SUCCESS;
        }
        auto& mine = per_thread.streams[context];
        if (!mine) {
            std::lock_guard<std::mutex> lock(context->mutex);
            mine = make(context, true, false);
        }
        *stream = mine;
        return CUDA_SUCCESS;
    }
    *stream = table().find(handle);
    if (*stream) return CUDA_SUCCESS;
    // A real driver follows the handle into freed memory.
    if (table().was(handle)) die("a stream was used that has been destroyed");
    return CUDA_ERROR_INVALID_HANDLE;
}

void drain(CUcontext context) {
    for (auto& stream : live_streams(context)) stream->wait_idle();
}

void drain_blocking(CUcontext context) {
    for (auto& stream : live_streams(context))
        if (stream->blocking || stream->legacy) stream->wait_idle();
}

CUresult put(CUstream handle, const char* kind, std::function<void()> work) {
    std::shared_ptr<Stream> stream;
    if (CUresult r = find_stream(handle, &stream)) return r;
    if (!context_alive(stream->context)) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    bool captured = false;
    if (CUresult r = capture_work(*stream, kind, work, &captured)) return r;
    if (captured) return CUDA_SUCCESS;
    if (stream->legacy)
        if (CUresult r = legacy_refuses(stream->context, true)) return r;
    stream->submit(std::move(work));
    return CUDA_SUCCESS;
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

static CUresult create(CUstream* stream, unsigned flags) {
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    if (!stream || (flags & ~unsigned(CU_STREAM_NON_BLOCKING))) return CUDA_ERROR_INVALID_VALUE;
    std::shared_ptr<Stream> made;
    {
        std::lock_guard<std::mutex> lock(context->mutex);
        made = make(context, !(flags & CU_STREAM_NON_BLOCKING), false);
    }
    *stream = table().add(std::move(made));
    stats::live(stats::kStreams, 1);
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned int flags) {
    SIM_ENTRY(0);
    return create(stream, flags);
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned int flags, int) {
    SIM_ENTRY(0);
    return create(stream, flags);
}

CUresult cuStreamDestroy_v2(CUstream handle) {
    SIM_ENTRY(0);
    auto stream = table().remove(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    capture_forget(*stream);
    stream->close();
    stats::live(stats::kStreams, -1);
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle) {
    SIM_ENTRY(0);
    std::shared_ptr<Stream> stream;
    if (CUresult r = find_stream(handle, &stream)) return r;
    if (CUresult r = capture_refuses_wait(*stream)) return r;
    if (stream->legacy) drain_blocking(stream->context);
    stream->wait_idle();
    return CUDA_SUCCESS;
}

CUresult cuStreamQuery(CUstream handle) {
    SIM_ENTRY(0);
    std::shared_ptr<Stream> stream;
    if (CUresult r = find_stream(handle, &stream)) return r;
    if (CUresult r = capture_refuses_wait(*stream)) return r;
    bool idle = stream->idle();
    if (stream->legacy)
        for (auto& other : live_streams(stream->context)) idle = idle && (!other->blocking || other->idle());
    return idle ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
    SIM_ENTRY(0);
    if (!id) return CUDA_ERROR_INVALID_VALUE;
    std::shared_ptr<Stream> stream;
    if (CUresult r = find_stream(handle, &stream)) return r;
    *id = stream->number;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
    SIM_ENTRY(0);
    std::shared_ptr<Stream> stream;
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = find_stream(handle, &stream)) return r;
    *context = stream->context;
    return CUDA_SUCCESS;
}
