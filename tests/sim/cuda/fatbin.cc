#include "fatbin.h"

#include <cstring>

namespace twoshot::sim {
namespace {

constexpr uint32_t kMagic = 0xBA55ED50;
constexpr uint16_t kPtx = 1, kElf = 2;

struct Header {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t payload_bytes;
};
static_assert(sizeof(Header) == 16, "file format");

// The start of each entry; further fields follow, `header_bytes` in all.
struct EntryHead {
    uint16_t kind, unknown;
    uint32_t header_bytes;
    uint64_t payload_bytes;
    uint32_t compressed_bytes, unknown2;
    uint16_t minor, major;
    uint32_t arch;                 // 90 for sm_90
};
static_assert(sizeof(EntryHead) == 32, "file format");

}  // namespace

CUresult fatbin_fits(const void* image, const Gpu& gpu) {
    Header header;
    memcpy(&header, image, sizeof header.magic);
    if (header.magic != kMagic) return CUDA_ERROR_INVALID_IMAGE;
    memcpy(&header, image, sizeof header);
    if (header.header_bytes < sizeof(Header) || header.version != 1) return CUDA_ERROR_INVALID_IMAGE;
    const char* at = static_cast<const char*>(image) + header.header_bytes;
    uint64_t left = header.payload_bytes;
    uint32_t wanted = uint32_t(gpu.cc_major * 10 + gpu.cc_minor);
    while (left >= sizeof(EntryHead)) {
        EntryHead entry;
        memcpy(&entry, at, sizeof entry);
        if (entry.header_bytes < sizeof entry || entry.header_bytes > left ||
            entry.payload_bytes > left - entry.header_bytes)
            return CUDA_ERROR_INVALID_IMAGE;
        // Machine code runs within its major version, upwards; PTX on anything newer.
        bool same_major = entry.arch / 10 == wanted / 10;
        if (entry.arch <= wanted && (entry.kind == kPtx || (entry.kind == kElf && same_major))) return CUDA_SUCCESS;
        at += entry.header_bytes + entry.payload_bytes;
        left -= entry.header_bytes + entry.payload_bytes;
    }
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
}

}  // namespace twoshot::sim
