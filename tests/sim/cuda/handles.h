// Handle values that are never used twice, unless that is asked for, so that a
// stale or foreign handle is refused instead of followed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace twoshot::sim {

template <class Handle, class Object>
class Handles {
public:
    explicit Handles(uint64_t kind, bool reuse = false) : first_((kind << 32) + 16), next_(first_), reuse_(reuse) {}

    Handle add(std::shared_ptr<Object> object) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto handle = reinterpret_cast<Handle>(next_);
        if (free_) {
            handle = free_;
            free_ = nullptr;
        } else {
            next_ += 16;
        }
        table_[handle] = std::move(object);
        return handle;
    }
    std::shared_ptr<Object> find(Handle handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto at = table_.find(handle);
        return at == table_.end() ? nullptr : at->second;
    }
    std::shared_ptr<Object> remove(Handle handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto at = table_.find(handle);
        if (at == table_.end()) return nullptr;
        auto object = std::move(at->second);
        table_.erase(at);
        if (reuse_) free_ = handle;
        return object;
    }

    std::map<Handle, std::shared_ptr<Object>> all() {
        std::lock_guard<std::mutex> lock(mutex_);
        return table_;
    }
    // Whether it was handed out, however long ago.
    bool was(Handle handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto value = reinterpret_cast<uint64_t>(handle);
        return value >= first_ && value < next_;
    }

private:
    std::mutex mutex_;
    uint64_t first_, next_;
    const bool reuse_;
    Handle free_ = nullptr;  // the last one that was given back
    std::map<Handle, std::shared_ptr<Object>> table_;
};

}  // namespace twoshot::sim
