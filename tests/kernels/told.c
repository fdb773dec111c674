/* Prints what the loader says: of multiboot or of PVH, whichever it was. */
#include "common.h"

struct multiboot_info {
  uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
  uint32_t mmap_length, mmap_addr, drives_length, drives_addr, config_table, boot_loader_name;
};
struct multiboot_module { uint32_t start, end, string, reserved; };
struct multiboot_mmap { uint32_t size; uint64_t addr, len; uint32_t type; } __attribute__((packed));
struct hvm_start_info {
  uint32_t magic, version, flags, nr_modules;
  uint64_t modlist, cmdline, rsdp, memmap;
  uint32_t memmap_entries, reserved;
};
struct hvm_module { uint64_t paddr, size, cmdline, reserved; };
struct hvm_memmap { uint64_t addr, size; uint32_t type, reserved; };

static const char *at(uint64_t gpa) { return (const char *)(uint32_t)gpa; }

static void say_module(uint64_t start, uint64_t length, uint64_t words) {
  say("module", start);
  say_text("words", at(words));
  print("content=");
  for (uint64_t i = 0; i < length && i < 32; i++) put(at(start)[i]);
  put('\n');
  say("length", length);
}

static void say_range(uint64_t addr, uint64_t length, uint32_t type) {
  say("range", addr);
  say("size", length);
  say("type", type);
}

void main(uint32_t magic, uint32_t info) {
  uint32_t cr0, cs, flags;
  __asm__ volatile("mov %%cr0, %0" : "=r"(cr0));
  __asm__ volatile("mov %%cs, %0" : "=r"(cs));
  __asm__ volatile("pushf; pop %0" : "=r"(flags));
  say("cr0", cr0);
  say("interrupts", flags >> 9 & 1);
  say("magic", magic);
  if (magic == 0x2BADB002) {
    struct multiboot_info *m = (void *)info;
    say("flags", m->flags);
    say("lower", m->mem_lower);
    say("upper", m->mem_upper);
    say_text("cmdline", at(m->cmdline));
    say_text("loader", at(m->boot_loader_name));
    struct multiboot_module *module = (void *)m->mods_addr;
    for (uint32_t i = 0; i < m->mods_count; i++, module++)
      say_module(module->start, module->end - module->start, module->string);
    for (uint32_t a = m->mmap_addr; a < m->mmap_addr + m->mmap_length;) {
      struct multiboot_mmap *range = (void *)a;
      say_range(range->addr, range->len, range->type);
      a += range->size + 4;
    }
  } else {
    struct hvm_start_info *h = (void *)info;
    say("start info", h->magic);
    say("version", h->version);
    say_text("cmdline", at(h->cmdline));
    print("rsdp=");
    for (int i = 0; i < 8; i++) put(at(h->rsdp)[i]);
    put('\n');
    struct hvm_module *module = (void *)(uint32_t)h->modlist;
    for (uint32_t i = 0; i < h->nr_modules; i++, module++)
      say_module(module->paddr, module->size, module->cmdline);
    struct hvm_memmap *range = (void *)(uint32_t)h->memmap;
    for (uint32_t i = 0; i < h->memmap_entries; i++, range++)
      say_range(range->addr, range->size, range->type);
  }
  finish(21);
}
