// The environment of a simulated process: which session, host and rank it is.
// Reads the environment; creates nothing.
#pragma once

#include <string>

namespace twoshot::sim {

struct Topology;

struct Session {
    std::string dir;       // TWOSHOT_SIM_DIR
    int host;              // TWOSHOT_SIM_HOST
    int rank;              // TWOSHOT_SIM_RANK, -1 when not given

    std::string path(const char* file) const { return dir + "/" + file; }
};

const Session& session();       // ends the process when the environment is incomplete
const Topology& topology();     // the session's, read at first use

// A mistake in the use of the simulator itself, never an error the driver would return.
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace twoshot::sim
