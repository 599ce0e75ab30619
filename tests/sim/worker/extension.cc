// The library that is loaded while the program runs (tests/sim/extension), and the pages of its call slots. See worker.h.
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

#include "worker.h"

namespace worker {
namespace {

Extension opened;

// Puts read-only copies in the place of the pages that are read-only after loading: nobody can make them writable again,
// as where the kernel seals such pages.
int freeze(struct dl_phdr_info* object, size_t, void* frozen) {
  if (!strstr(object->dlpi_name, "libsim_extension.so")) return 0;
  uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  for (int i = 0; i < object->dlpi_phnum; ++i) {
    const ElfW(Phdr)& header = object->dlpi_phdr[i];
    if (header.p_type != PT_GNU_RELRO) continue;
    uintptr_t start = (object->dlpi_addr + header.p_vaddr) / page * page;
    uintptr_t end = (object->dlpi_addr + header.p_vaddr + header.p_memsz) / page * page;
    int file = memfd_create("frozen", MFD_CLOEXEC);
    bool copied = file >= 0 && write(file, reinterpret_cast<void*>(start), end - start) == ssize_t(end - start);
    int readable = open(("/proc/self/fd/" + std::to_string(file)).c_str(), O_RDONLY | O_CLOEXEC);
    void* mapped = copied && readable >= 0 ? mmap(reinterpret_cast<void*>(start), end - start, PROT_READ,
                                                  MAP_SHARED | MAP_FIXED, readable, 0)
                                           : MAP_FAILED;
    close(file);
    close(readable);
    *static_cast<bool*>(frozen) = mapped != MAP_FAILED && end > start;
  }
  return 1;
}

}  // namespace

void open_extension(bool frozen) {
  void* library = dlopen("libsim_extension.so", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("dlopen: ") + dlerror());
  opened.init = reinterpret_cast<decltype(opened.init)>(dlsym(library, "extension_init"));
  opened.all_reduce = reinterpret_cast<decltype(opened.all_reduce)>(dlsym(library, "extension_all_reduce"));
  if (!frozen) return;
  bool done = false;
  dl_iterate_phdr(freeze, &done);
  if (!done) throw std::runtime_error("the pages could not be frozen");
}

const Extension& extension() {
  if (!opened.init || !opened.all_reduce) throw std::runtime_error("no extension was loaded");
  return opened;
}

}  // namespace worker
