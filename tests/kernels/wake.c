/* Wakes every other processor with INIT and SIPI, and lets each count itself. */
#include "common.h"

volatile uint32_t awake;
extern char trampoline[], trampoline_end[];

__asm__(".pushsection .text\n"
        ".code16\n"
        "trampoline: mov %cs, %ax\n"
        "mov %ax, %ds\n"
        "lock incl (counter - trampoline)\n"
        "1: hlt\n"
        "jmp 1b\n"
        ".align 4\n"
        "counter: .long 0\n"
        "trampoline_end:\n"
        ".code32\n"
        ".popsection\n");
extern char counter[];

static volatile uint32_t *apic = (void *)0xFEE00000;

static void command(uint32_t low) {
  apic[0x310 / 4] = 0;
  apic[0x300 / 4] = low;
  while (apic[0x300 / 4] & 1 << 12) /* delivery status */
    ;
}

void main(void) {
  char *page = (char *)0x8000;
  for (char *from = trampoline; from < trampoline_end; from++) *page++ = *from;
  volatile uint32_t *count = (void *)(0x8000 + (counter - trampoline));
  apic[0xF0 / 4] = 0x1FF;
  command(0xC4500); /* INIT, to all but this one */
  for (int i = 0; i < 100; i++) inb(0x80);
  command(0xC4608); /* SIPI, to page 8 */
  uint32_t expected = 0;
  outw(0x510, 5);
  expected = inb(0x511);
  while (*count < expected - 1) __asm__ volatile("pause");
  say("awake", *count);
  finish(*count);
}
