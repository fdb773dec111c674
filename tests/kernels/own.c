/* Drives tests/own_copier.py: registers in memory, guest RAM copied by it, its interrupt, its end. */
#include "common.h"

enum { SOURCE, TARGET, LENGTH, GO, STATUS, EXIT };
enum { VECTOR = 0x30, PIN = 23 };

static struct { uint16_t low, selector, flags, high; } idt[VECTOR + 1];
static volatile uint32_t *device = (void *)0xD8000000;
static volatile uint32_t *ioapic = (void *)0xFEC00000;
static volatile uint32_t *apic = (void *)0xFEE00000;

/* Waits for the next interrupt; see tick.c. */
void wait(void);
__asm__(".pushsection .text\n"
        "wait: sti\n"
        "1: hlt\n"
        "jmp 1b\n"
        "on_interrupt: addl $12, %esp\n"
        "ret\n"
        ".popsection\n");
extern void on_interrupt(void);

static void set_ioapic(uint32_t index, uint32_t value) {
  ioapic[0] = index;
  ioapic[4] = value;
}

static char from[] = "moved by the device", to[sizeof from];

void main(void) {
  uint32_t handler = (uint32_t)on_interrupt;
  uint16_t cs;
  __asm__ volatile("mov %%cs, %0" : "=r"(cs));
  idt[VECTOR].low = handler;
  idt[VECTOR].selector = cs;
  idt[VECTOR].flags = 0x8E00;
  idt[VECTOR].high = handler >> 16;
  struct { uint16_t limit; uint32_t base; } __attribute__((packed)) where = {sizeof idt - 1, (uint32_t)idt};
  __asm__ volatile("lidt %0" : : "m"(where));
  outb(0x21, 0xFF), outb(0xA1, 0xFF); /* the PICs are silent */
  apic[0xF0 / 4] = 0x1FF;
  set_ioapic(0x10 + 2 * PIN + 1, 0);                /* to processor 0 */
  set_ioapic(0x10 + 2 * PIN, VECTOR | 1 << 15);     /* by level, active high */

  for (int times = 1; times <= 3; times++) {
    for (uint32_t i = 0; i < sizeof to; i++) to[i] = 0;
    device[SOURCE] = (uint32_t)from;
    device[TARGET] = (uint32_t)to;
    device[LENGTH] = sizeof from;
    device[GO] = 1;
    wait();
    say("status", device[STATUS]);
    device[STATUS] = 0; /* the line falls */
    apic[0xB0 / 4] = 0; /* end of interrupt */
    say_text("text", to);
  }
  device[SOURCE] = 0xF0000000; /* no RAM: an answer, and no copy */
  device[GO] = 1;
  say("bad", device[STATUS]);
  device[EXIT] = 9;
  for (;;) __asm__ volatile("hlt");
}
