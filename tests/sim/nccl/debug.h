// Debug lines in NCCL's shape, the last error text, call counters and the simulator's fault hook.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "nccl_api.h"

namespace simnccl {

enum Level { kNone = 0, kVersion = 1, kWarn = 2, kInfo = 3, kAbort = 4, kTrace = 5 };

// The signature that plugins receive as their logger.
void plugin_log(int level, unsigned long flags, const char* file, int line, const char* format, ...)
    __attribute__((format(printf, 5, 6)));
void log_line(Level level, const char* file, int line, const char* format, ...) __attribute__((format(printf, 4, 5)));
std::string last_error();
bool env_flag(const char* name);
long env_number(const char* name, long otherwise);
int version();

// One counter for each exported function, found by name from sim_nccl_calls().
class Counter {
 public:
  explicit Counter(const char* name);
  void hit() { count_.fetch_add(1, std::memory_order_relaxed); }
  uint64_t count() const { return count_.load(std::memory_order_relaxed); }
  const char* name() const { return name_; }
  Counter* next() const { return next_; }

 private:
  const char* name_;
  std::atomic<uint64_t> count_{0};
  Counter* next_;
};

uint64_t calls_of(const char* name);
// Counts operations that really ran: a graph replay counts here and not among the calls.
void count_execution(const char* name);
uint64_t executions_of(const char* name);

// The simulator's fault rules: 0 or the result to return. May block or end the process.
ncclResult_t enter(const char* name);

}  // namespace simnccl

#define SIM_INFO(...) ::simnccl::log_line(::simnccl::kInfo, __FILE__, __LINE__, __VA_ARGS__)
#define SIM_WARN(...) ::simnccl::log_line(::simnccl::kWarn, __FILE__, __LINE__, __VA_ARGS__)

// Every exported function begins with this: it counts the call and obeys a fault rule.
#define SIM_ENTER(name)                                                  \
  static ::simnccl::Counter sim_counter_(#name);                         \
  sim_counter_.hit();                                                    \
  if (ncclResult_t sim_fault_ = ::simnccl::enter(#name)) return sim_fault_
