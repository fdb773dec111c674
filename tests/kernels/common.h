/* What the test kernels share: port I/O, a serial line, and the two ends of a run. */
#include <stdint.h>

static inline void outb(uint16_t port, uint8_t value) {
  __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void outw(uint16_t port, uint16_t value) {
  __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static inline void outl(uint16_t port, uint32_t value) {
  __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t inb(uint16_t port) {
  uint8_t value;
  __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}

static inline void put(char c) {
  while (!(inb(0x3FD) & 0x20)) /* LSR: THRE */
    ;
  outb(0x3F8, c);
}

static inline void print(const char *text) {
  while (*text) put(*text++);
}

static inline void print_hex(uint64_t value) {
  print("0x");
  int shift = 60;
  while (shift && !(value >> shift & 15)) shift -= 4;
  for (; shift >= 0; shift -= 4) put("0123456789abcdef"[value >> shift & 15]);
}

static inline void say(const char *name, uint64_t value) {
  print(name);
  put('=');
  print_hex(value);
  put('\n');
}

static inline void say_text(const char *name, const char *text) {
  print(name);
  put('=');
  print(text);
  put('\n');
}

static inline void finish(uint32_t value) {
  outl(0xF4, value);
  for (;;) __asm__ volatile("hlt");
}
