// Threads of the simulated driver: a stack size of their own, and none of the
// program's signals.
#pragma once

#include <pthread.h>

#include <functional>

namespace twoshot::sim {

pthread_t start_thread(std::function<void()> body);

}  // namespace twoshot::sim
