#include "threads.h"

#include "session.h"

#include <signal.h>

namespace twoshot::sim {

constexpr size_t kThreadStack = 1 << 20;

pthread_t start_thread(std::function<void()> body) {
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, kThreadStack);
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (int fatal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) sigdelset(&blocked, fatal);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    auto run = [](void* argument) -> void* {
        auto* function = static_cast<std::function<void()>*>(argument);
        (*function)();
        delete function;
        return nullptr;
    };
    pthread_t thread;
    if (pthread_create(&thread, &attr, run, new std::function<void()>(std::move(body))) != 0)
        die("cannot start a thread");
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attr);
    return thread;
}

}  // namespace twoshot::sim
