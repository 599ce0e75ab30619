// The driver's own test program: `sim_selftest SCENARIO RANK RANKS [OPTION]`.
#include "selftest.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

static std::string shared(const std::string& name) { return std::string(getenv("TWOSHOT_SIM_DIR")) + "/t." + name; }

void start() {
    CUcontext context;
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
}

void stop() { OK(cuDevicePrimaryCtxRelease_v2(0)); }

CUmemAllocationProp pinned(int handle_types, int device) {
    CUmemAllocationProp prop = {};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.requestedHandleTypes = handle_types;
    prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    return prop;
}

CUdeviceptr map(CUmemGenericAllocationHandle handle, size_t bytes, size_t alignment) {
    CUdeviceptr at = 0;
    CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    OK(cuMemAddressReserve(&at, bytes, alignment, 0, 0));
    OK(cuMemMap(at, bytes, 0, handle, 0));
    OK(cuMemSetAccess(at, bytes, &access, 1));
    return at;
}

void unmap(CUdeviceptr at, size_t bytes) {
    OK(cuMemUnmap(at, bytes));
    OK(cuMemAddressFree(at, bytes));
}

void publish(const std::string& name, const void* bytes, size_t size) {
    std::string path = shared(name), partial = path + ".partial";
    int fd = open(partial.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    TRUE(fd >= 0 && write(fd, bytes, size) == ssize_t(size));
    close(fd);
    OK(rename(partial.c_str(), path.c_str()));
}

void obtain(const std::string& name, void* bytes, size_t size) {
    int fd;
    while ((fd = open(shared(name).c_str(), O_RDONLY | O_CLOEXEC)) < 0) usleep(1000);
    TRUE(read(fd, bytes, size) == ssize_t(size));
    close(fd);
}

static sockaddr_un address(const std::string& name) {
    sockaddr_un a = {};
    a.sun_family = AF_UNIX;
    strncpy(a.sun_path, shared(name).c_str(), sizeof a.sun_path - 1);
    return a;
}

void send_fd(const std::string& name, int fd, int times) {
    sockaddr_un to = address(name);
    int server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    OK(bind(server, reinterpret_cast<sockaddr*>(&to), sizeof to));
    OK(listen(server, 64));
    while (times--) {
        int client = accept(server, nullptr, nullptr);
        char byte = 0, control[CMSG_SPACE(sizeof fd)] = {};
        iovec data = {&byte, 1};
        msghdr message = {};
        message.msg_iov = &data;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        cmsghdr* header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
        TRUE(sendmsg(client, &message, 0) == 1);
        close(client);
    }
    close(server);
}

int receive_fd(const std::string& name) {
    sockaddr_un from = address(name);
    int client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), fd = -1;
    while (connect(client, reinterpret_cast<sockaddr*>(&from), sizeof from) != 0) usleep(1000);
    char byte, control[CMSG_SPACE(sizeof fd)];
    iovec data = {&byte, 1};
    msghdr message = {};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    TRUE(recvmsg(client, &message, MSG_CMSG_CLOEXEC) == 1);
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    close(client);
    return fd;
}

void barrier(const Args& args, const char* name) {
    char one = 1;
    std::string base = std::string("barrier.") + name + ".";
    publish(base + std::to_string(args.rank), &one, 1);
    for (int r = 0; r < args.ranks; r++) obtain(base + std::to_string(r), &one, 1);
}

int main(int argc, char** argv) {
    if (argc < 4) return 2;
    Args args = {atoi(argv[2]), atoi(argv[3]), argc > 4 ? argv[4] : ""};
    for (const Scenario* list : {memory_scenarios, multicast_scenarios, stream_scenarios, kernel_scenarios})
        for (; list->name; list++)
            if (strcmp(list->name, argv[1]) == 0) {
                list->run(args);
                return 0;
            }
    fprintf(stderr, "no scenario %s\n", argv[1]);
    return 2;
}
