/* Ends as its command line says. */
#include "common.h"

static int is(const char *a, const char *b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

void main(uint32_t magic, uint32_t *info) {
  const char *how = (const char *)info[4];
  (void)magic;
  print("once\n");
  if (is(how, "cf9")) outb(0xCF9, 2), outb(0xCF9, 6);
  if (is(how, "i8042")) outb(0x64, 0xFE);
  if (is(how, "acpi-reset")) outb(0x602, 1);
  if (is(how, "acpi-off")) outb(0x600, 0x34);
  if (is(how, "byte")) outb(0xF4, 0x41);
  if (is(how, "word")) outw(0xF4, 0x1234);
  if (is(how, "dword")) outl(0xF4, 0x12345678);
  if (is(how, "fault")) {
    struct { uint16_t limit; uint32_t base; } __attribute__((packed)) none = {0, 0};
    __asm__ volatile("lidt %0; ud2" : : "m"(none));
  }
  for (;;) __asm__ volatile("hlt");
}
