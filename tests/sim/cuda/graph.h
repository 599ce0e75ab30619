// Graphs, their executable form, and the user objects they keep alive.
#pragma once

#include "sim.h"

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace twoshot::sim {

struct Node {
    const char* kind;
    std::function<void()> run;
    std::vector<Node*> after;
    size_t index;
};

struct UserObject;

// References to user objects, given back at destruction.
class UserReferences {
public:
    UserReferences() = default;
    UserReferences(const UserReferences& other);
    UserReferences& operator=(const UserReferences&) = delete;
    ~UserReferences();
    void take(std::shared_ptr<UserObject> object, unsigned count);   // references that were made already

private:
    std::vector<std::pair<std::shared_ptr<UserObject>, unsigned>> held_;
};

// While a graph is recorded its fields are guarded by capture_mutex.
struct Graph {
    std::vector<std::unique_ptr<Node>> nodes;     // every node behind those it depends on
    UserReferences objects;

    Node* add(const char* kind, std::function<void()> run, std::vector<Node*> after);
    bool holds(const Node* node) const;
};

CUgraph graph_new(std::shared_ptr<Graph>* graph);
void graph_discard(CUgraph handle);

}  // namespace twoshot::sim
