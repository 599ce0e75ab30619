// See debug.h. Reads the environment, writes to standard output; touches nothing else.
#include "debug.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>

extern "C" int twoshot_sim_enter(const char* name) __attribute__((weak));

namespace simnccl {
namespace {

std::atomic<Counter*> counters{nullptr};

// Never destroyed: host functions may still run while the process exits.
std::mutex& text_lock() {
  static auto* lock = new std::mutex;
  return *lock;
}
std::string& error_text() {
  static auto* text = new std::string;
  return *text;
}
std::map<std::string, uint64_t>& executions() {
  static auto* map = new std::map<std::string, uint64_t>;
  return *map;
}

Level wanted() {
  static const Level level = [] {
    const char* text = getenv("NCCL_DEBUG");
    if (!text) return kNone;
    if (!strcasecmp(text, "VERSION")) return kVersion;
    if (!strcasecmp(text, "WARN")) return kWarn;
    if (!strcasecmp(text, "INFO")) return kInfo;
    if (!strcasecmp(text, "ABORT")) return kAbort;
    if (!strcasecmp(text, "TRACE")) return kTrace;
    return kNone;
  }();
  return level;
}

void emit(Level level, const char* file, int line, const char* format, va_list arguments) {
  char body[1024];
  vsnprintf(body, sizeof body, format, arguments);
  if (level == kWarn) {
    std::lock_guard<std::mutex> guard(text_lock());
    error_text() = body;
  }
  if (level > wanted() || level == kNone) return;
  char host[64] = "host";
  gethostname(host, sizeof host - 1);
  if (char* dot = strchr(host, '.')) *dot = 0;
  long thread = syscall(SYS_gettid);
  char text[1280];
  int length;
  if (level == kWarn) {
    const char* base = strrchr(file, '/');
    char stamp[32] = "";
    time_t now = time(nullptr);
    struct tm parts;
    if (localtime_r(&now, &parts)) strftime(stamp, sizeof stamp, "[%Y-%m-%d %H:%M:%S] ", &parts);
    length = snprintf(text, sizeof text, "\n%s%s:%d:%ld %s:%d NCCL WARN %s\n", stamp, host, getpid(), thread,
                      base ? base + 1 : file, line, body);
  } else {
    length = snprintf(text, sizeof text, "%s:%d:%ld NCCL INFO %s\n", host, getpid(), thread, body);
  }
  if (length >= int(sizeof text)) {
    length = sizeof text - 1;
    text[length - 1] = '\n';
  }
  // One write, so that lines of several ranks on one pipe stay whole.
  fflush(stdout);
  if (write(STDOUT_FILENO, text, size_t(length)) < 0) return;
}

}  // namespace

void log_line(Level level, const char* file, int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  emit(level, file, line, format, arguments);
  va_end(arguments);
}

void plugin_log(int level, unsigned long, const char* file, int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  emit(Level(level), file ? file : "plugin", line, format, arguments);
  va_end(arguments);
}

std::string last_error() {
  std::lock_guard<std::mutex> guard(text_lock());
  return error_text();
}

bool env_flag(const char* name) {
  const char* text = getenv(name);
  return text && *text && strcmp(text, "0") != 0;
}

long env_number(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text && *text ? strtol(text, nullptr, 0) : otherwise;
}

int version() {
#ifdef SIM_NCCL_OLD
  static const int code = int(env_number("SIM_NCCL_VERSION", 22005));
#else
  static const int code = int(env_number("SIM_NCCL_VERSION", 22809));
#endif
  return code;
}

Counter::Counter(const char* name) : name_(name) {
  next_ = counters.load(std::memory_order_relaxed);
  while (!counters.compare_exchange_weak(next_, this, std::memory_order_release, std::memory_order_relaxed)) {
  }
}

uint64_t calls_of(const char* name) {
  uint64_t total = 0;
  for (Counter* c = counters.load(std::memory_order_acquire); c; c = c->next()) {
    if (!strcmp(c->name(), name)) total += c->count();
  }
  return total;
}

void count_execution(const char* name) {
  std::lock_guard<std::mutex> guard(text_lock());
  ++executions()[name];
}

uint64_t executions_of(const char* name) {
  std::lock_guard<std::mutex> guard(text_lock());
  auto found = executions().find(name);
  return found == executions().end() ? 0 : found->second;
}

ncclResult_t enter(const char* name) { return twoshot_sim_enter ? twoshot_sim_enter(name) : ncclSuccess; }

}  // namespace simnccl

extern "C" __attribute__((visibility("default"))) uint64_t sim_nccl_calls(const char* name) {
  return simnccl::calls_of(name);
}

extern "C" __attribute__((visibility("default"))) uint64_t sim_nccl_executions(const char* name) {
  return simnccl::executions_of(name);
}
