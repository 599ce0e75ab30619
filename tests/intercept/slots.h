/* Prints where every slot for an NCCL function leads, in every loaded object:
 *   slot <object> <jump|data> <function> <owner|lazy> <rw|ro>
 * Written apart from src/intercept so that the two can disagree. glibc only. */
#ifndef TWOSHOT_TEST_SLOTS_H
#define TWOSHOT_TEST_SLOTS_H

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#define SLOT_JUMP R_X86_64_JUMP_SLOT
#define SLOT_DATA R_X86_64_GLOB_DAT
#else
#define SLOT_JUMP R_AARCH64_JUMP_SLOT
#define SLOT_DATA R_AARCH64_GLOB_DAT
#endif

static const char *slots_file(const char *path) {
  const char *slash = strrchr(path, '/');
  if (path[0] == 0) return "program";
  return slash ? slash + 1 : path;
}

static int slots_writable(uintptr_t address) {
  FILE *maps = fopen("/proc/self/maps", "r");
  char line[4200], rights[5];
  unsigned long start, end;
  int writable = -1;
  while (maps && fgets(line, sizeof line, maps))
    if (sscanf(line, "%lx-%lx %4s", &start, &end, rights) == 3 && start <= address && address < end)
      writable = rights[1] == 'w';
  if (maps) fclose(maps);
  return writable;
}

static void slots_of_table(struct link_map *object, const Elf64_Rela *table, size_t size, const Elf64_Sym *symbols,
                           const char *strings) {
  for (size_t i = 0; i < size / sizeof *table; ++i) {
    uint32_t type = (uint32_t)ELF64_R_TYPE(table[i].r_info);
    const char *name = strings + symbols[ELF64_R_SYM(table[i].r_info)].st_name;
    if ((type != SLOT_JUMP && type != SLOT_DATA) || strncmp(name, "nccl", 4) != 0) continue;
    uintptr_t address = object->l_addr + table[i].r_offset;
    void *value = *(void **)address;
    Dl_info info;
    struct link_map *owner = NULL;
    if (!dladdr1(value, &info, (void **)&owner, RTLD_DL_LINKMAP)) owner = NULL;
    int lazy = owner == object && type == SLOT_JUMP && !strstr(info.dli_sname ? info.dli_sname : "", name);
    printf("slot %s %s %s %s %s\n", slots_file(object->l_name), type == SLOT_JUMP ? "jump" : "data", name,
           !owner ? "nowhere" : lazy ? "lazy" : slots_file(owner->l_name),
           slots_writable(address) ? "rw" : "ro");
  }
}

static void print_slots(void) {
  struct link_map *object;
  void *program = dlopen(NULL, RTLD_LAZY);
  dlinfo(program, RTLD_DI_LINKMAP, &object);
  for (; object; object = object->l_next) {
    const Elf64_Rela *data = NULL, *jumps = NULL;
    const Elf64_Sym *symbols = NULL;
    const char *strings = NULL;
    size_t data_size = 0, jumps_size = 0;
    if (strstr(object->l_name, "vdso")) continue;
    for (const Elf64_Dyn *entry = object->l_ld; entry->d_tag != DT_NULL; ++entry) {
      if (entry->d_tag == DT_RELA) data = (void *)entry->d_un.d_ptr;
      if (entry->d_tag == DT_JMPREL) jumps = (void *)entry->d_un.d_ptr;
      if (entry->d_tag == DT_SYMTAB) symbols = (void *)entry->d_un.d_ptr;
      if (entry->d_tag == DT_STRTAB) strings = (void *)entry->d_un.d_ptr;
      if (entry->d_tag == DT_RELASZ) data_size = entry->d_un.d_val;
      if (entry->d_tag == DT_PLTRELSZ) jumps_size = entry->d_un.d_val;
    }
    if (!symbols || !strings) continue;
    slots_of_table(object, jumps, jumps ? jumps_size : 0, symbols, strings);
    slots_of_table(object, data, data ? data_size : 0, symbols, strings);
  }
}

#endif
