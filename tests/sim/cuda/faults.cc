#include "faults.h"

#include "session.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace twoshot::sim::faults {
namespace {

struct Rule {
    std::string call;
    unsigned long nth = 0;
    int code = 0;
    long delay_ms = 0, stop_ms = 0, for_ms = 0;
    std::atomic<int64_t> first_ms{0};
    bool block = false, kill = false, sticky = false;
    std::atomic<unsigned long> uses{0};
};

std::atomic<int> poison{0};

bool matches(const std::string& rule, const char* name) {
    size_t length = rule.size();
    if (strncmp(name, rule.c_str(), length) != 0) return false;
    const char* rest = name + length;
    return *rest == 0 || (rest[0] == '_' && rest[1] == 'v' && rest[2] >= '1' && rest[2] <= '9' && rest[3] == 0);
}

std::vector<Rule*> parse() {
    std::vector<Rule*> rules;
    const char* text = getenv("TWOSHOT_SIM_FAULTS");
    if (!text) return rules;
    const char* rank = getenv("TWOSHOT_SIM_RANK");
    std::istringstream all(text);
    std::string one, word;
    while (std::getline(all, one, ';')) {
        if (one.find_first_not_of(" \t\n") == std::string::npos) continue;
        auto* rule = new Rule;
        bool mine = true;
        std::istringstream words(one);
        while (std::getline(words, word, ',')) {
            size_t first = word.find_first_not_of(" \t\n"), at = word.find('=');
            if (first == std::string::npos) continue;
            std::string key = word.substr(first, at == std::string::npos ? at : at - first);
            const char* value = at == std::string::npos ? "" : word.c_str() + at + 1;
            if (key == "rank") mine = strcmp(value, "*") == 0 || (rank && atoi(rank) == atoi(value));
            else if (key == "call") rule->call = value;
            else if (key == "nth") rule->nth = strtoul(value, nullptr, 10);
            else if (key == "code") rule->code = atoi(value);
            else if (key == "for") rule->for_ms = atol(value);
            else if (key == "delay") rule->delay_ms = atol(value);
            else if (key == "stop") rule->stop_ms = atol(value);
            else if (key == "block") rule->block = true;
            else if (key == "kill") rule->kill = true;
            else if (key == "sticky") rule->sticky = true;
            else die("fault rule `%s`: unknown word `%s`", one.c_str(), word.c_str());
        }
        if (rule->call.empty() || !(rule->code || rule->delay_ms || rule->stop_ms || rule->block || rule->kill))
            die("fault rule `%s` names no call or no effect", one.c_str());
        if (mine) rules.push_back(rule);
        else delete rule;
    }
    return rules;
}

// Every thread of the process stands still; a child wakes it.
void stop_for(long ms) {
    pid_t own = getpid(), child = fork();
    if (child == 0) {
        usleep(useconds_t(ms) * 1000);
        kill(own, SIGCONT);
        _exit(0);
    }
    raise(SIGSTOP);
    waitpid(child, nullptr, 0);
}

const std::vector<Rule*>& rules() {
    static const auto* once = new std::vector<Rule*>(parse());
    return *once;
}

}  // namespace

bool filtered() {
    static const bool once = getenv("TWOSHOT_SIM_CALLER") != nullptr;
    return once;
}

bool concerns(const void* caller) {
    if (!filtered()) return true;
    static const std::string* wanted = new std::string(getenv("TWOSHOT_SIM_CALLER"));
    Dl_info info;
    if (!dladdr(caller, &info) || !info.dli_fname) return false;
    const char* slash = strrchr(info.dli_fname, '/');
    return *wanted == (slash ? slash + 1 : info.dli_fname);
}

bool any() { return !rules().empty(); }

bool watches(const char* name) {
    for (const Rule* rule : rules())
        if (matches(rule->call, name)) return true;
    return false;
}

int sticky() { return poison.load(std::memory_order_relaxed); }

int apply(const char* name) {
    int code = 0;
    for (Rule* rule : rules()) {
        if (!matches(rule->call, name)) continue;
        unsigned long use = ++rule->uses;
        if (rule->nth != 0 && use != rule->nth) continue;
        if (rule->for_ms) {
            // Only so long, from the first use on.
            using namespace std::chrono;
            int64_t now = duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count(), none = 0;
            rule->first_ms.compare_exchange_strong(none, now);
            if (now - rule->first_ms > rule->for_ms) continue;
        }
        if (rule->delay_ms) usleep(useconds_t(rule->delay_ms) * 1000);
        if (rule->stop_ms) stop_for(rule->stop_ms);
        if (rule->kill) {
            dprintf(2, "twoshot-sim: fault rule kills this process in %s\n", name);
            raise(SIGKILL);
        }
        if (rule->block) {
            dprintf(2, "twoshot-sim: fault rule blocks in %s\n", name);
            for (;;) pause();
        }
        if (rule->code) {
            code = rule->code;
            if (rule->sticky) poison = code;
        }
    }
    return code;
}

}  // namespace twoshot::sim::faults
