#include "graph.h"

#include "capture.h"
#include "handles.h"
#include "stats.h"
#include "streams.h"
#include "threads.h"

#include <algorithm>
#include <condition_variable>

namespace twoshot::sim {
namespace {

Handles<CUgraph, Graph>& graphs() {
    static auto* handles = new Handles<CUgraph, Graph>(0x53);
    return *handles;
}

// A graph made ready: the nodes dealt out to lanes. A lane is a chain of nodes;
// branches run side by side, as they may on a GPU.
struct Executable {
    struct Step {
        std::function<void()> run;
        std::vector<size_t> after;
        size_t lane;
    };
    std::vector<Step> steps;
    size_t lanes = 0;
    UserReferences objects;
    std::mutex running;              // launches of one executable graph follow each other

    explicit Executable(const Graph& graph) : objects(graph.objects) {
        std::vector<size_t> ends;    // last step of each lane
        for (const auto& node : graph.nodes) {
            Step step{node->run, {}, 0};
            for (const Node* n : node->after) step.after.push_back(n->index);
            auto free = std::find_if(ends.begin(), ends.end(), [&](size_t end) {
                return std::find(step.after.begin(), step.after.end(), end) != step.after.end();
            });
            step.lane = size_t(free - ends.begin());
            if (free == ends.end()) ends.push_back(0);
            ends[step.lane] = steps.size();
            steps.push_back(std::move(step));
        }
        lanes = ends.size();
    }

    void run() {
        std::lock_guard<std::mutex> one(running);
        std::mutex mutex;
        std::condition_variable progress;
        std::vector<char> done(steps.size(), 0);
        auto follow = [&](size_t lane) {
            for (size_t i = 0; i < steps.size(); i++) {
                if (steps[i].lane != lane) continue;
                {
                    std::unique_lock<std::mutex> lock(mutex);
                    progress.wait(lock, [&] {
                        return std::all_of(steps[i].after.begin(), steps[i].after.end(), [&](size_t n) { return done[n]; });
                    });
                }
                steps[i].run();
                std::lock_guard<std::mutex> lock(mutex);
                done[i] = 1;
                progress.notify_all();
            }
        };
        std::vector<pthread_t> threads;
        for (size_t lane = 1; lane < lanes; lane++) threads.push_back(start_thread([&follow, lane] { follow(lane); }));
        follow(0);
        for (pthread_t t : threads) pthread_join(t, nullptr);
    }
};

Handles<CUgraphExec, Executable>& executables() {
    static auto* handles = new Handles<CUgraphExec, Executable>(0x54);
    return *handles;
}

}  // namespace

Node* Graph::add(const char* kind, std::function<void()> run, std::vector<Node*> after) {
    nodes.push_back(std::make_unique<Node>(Node{kind, std::move(run), std::move(after), nodes.size()}));
    return nodes.back().get();
}

bool Graph::holds(const Node* node) const {
    return std::any_of(nodes.begin(), nodes.end(), [&](const auto& n) { return n.get() == node; });
}

CUgraph graph_new(std::shared_ptr<Graph>* graph) {
    *graph = std::make_shared<Graph>();
    stats::live(stats::kGraphs, 1);
    return graphs().add(*graph);
}

void graph_discard(CUgraph handle) {
    if (graphs().remove(handle)) stats::live(stats::kGraphs, -1);
}

std::shared_ptr<Graph> graph_find(CUgraph handle) { return graphs().find(handle); }

}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph handle, unsigned long long flags) {
    SIM_ENTRY(kUnsafe);
    auto graph = graphs().find(handle);
    if (!exec || !graph || (flags & ~15ull)) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(capture_mutex());
    *exec = executables().add(std::make_shared<Executable>(*graph));
    stats::live(stats::kGraphExecs, 1);
    return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    SIM_ENTRY(0);
    auto ready = executables().find(exec);
    if (!ready) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = put(stream, "graph", [ready] { ready->run(); })) return r;
    stats::total(stats::kGraphLaunches);
    return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec exec) {
    SIM_ENTRY(0);
    if (!executables().remove(exec)) return CUDA_ERROR_INVALID_VALUE;
    stats::live(stats::kGraphExecs, -1);
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
    SIM_ENTRY(0);
    if (!graphs().remove(graph)) return CUDA_ERROR_INVALID_VALUE;
    stats::live(stats::kGraphs, -1);
    return CUDA_SUCCESS;
}

CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
    SIM_ENTRY(0);
    auto graph = graphs().find(handle);
    if (!graph || !count) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(capture_mutex());
    if (nodes)
        for (size_t i = 0; i < *count && i < graph->nodes.size(); i++)
            nodes[i] = reinterpret_cast<CUgraphNode>(graph->nodes[i].get());
    *count = nodes ? std::min(*count, graph->nodes.size()) : graph->nodes.size();
    return CUDA_SUCCESS;
}
