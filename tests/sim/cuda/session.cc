#include "session.h"

#include "topology.h"

#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace twoshot::sim {

void die(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    dprintf(2, "twoshot-sim: %s\n", text);
    abort();
}

const Session& session() {
    static const Session* once = [] {
        auto* s = new Session;
        const char* dir = getenv("TWOSHOT_SIM_DIR");
        if (!dir || !*dir) die("TWOSHOT_SIM_DIR is not set");
        s->dir = dir;
        const char* host = getenv("TWOSHOT_SIM_HOST");
        s->host = host ? atoi(host) : 0;
        const char* rank = getenv("TWOSHOT_SIM_RANK");
        s->rank = rank ? atoi(rank) : -1;
        return s;
    }();
    return *once;
}

const Topology& topology() {
    static const Topology* once = [] {
        std::ifstream file(session().path("topology"));
        if (!file) die("no topology in %s", session().dir.c_str());
        std::stringstream text;
        text << file.rdbuf();
        auto* t = new Topology;
        try {
            *t = parse_topology(text.str());
        } catch (const std::runtime_error& error) {
            die("%s", error.what());
        }
        if (session().host < 0 || size_t(session().host) >= t->hosts.size())
            die("TWOSHOT_SIM_HOST=%d is not in the topology", session().host);
        return t;
    }();
    return *once;
}

}  // namespace twoshot::sim
