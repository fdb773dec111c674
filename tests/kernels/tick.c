/* Counts ten interrupts of the PIT, through the PIC and an IDT of its own. */
#include "common.h"

static struct { uint16_t low, selector, flags, high; } idt[0x30];

/* Waits for the next interrupt. Its handler leaves by the stack it found instead of by IRET, which
   a KVM in software may not know in protected mode. */
void wait(void);
__asm__(".pushsection .text\n"
        "wait: sti\n"
        "1: hlt\n"
        "jmp 1b\n"
        "on_tick: addl $12, %esp\n" /* EIP, CS, EFLAGS; interrupts are off from here */
        "ret\n"
        ".popsection\n");
extern void on_tick(void);

void main(void) {
  uint32_t handler = (uint32_t)on_tick;
  uint16_t cs;
  __asm__ volatile("mov %%cs, %0" : "=r"(cs));
  idt[0x20].low = handler;
  idt[0x20].selector = cs;
  idt[0x20].flags = 0x8E00;
  idt[0x20].high = handler >> 16;
  struct { uint16_t limit; uint32_t base; } __attribute__((packed)) where = {sizeof idt - 1, (uint32_t)idt};
  __asm__ volatile("lidt %0" : : "m"(where));
  outb(0x20, 0x11), outb(0x21, 0x20), outb(0x21, 4), outb(0x21, 1);
  outb(0x21, 0xFE); /* IRQ 0 alone */
  outb(0x43, 0x34), outb(0x40, 1193182 / 1000 & 0xFF), outb(0x40, 1193182 / 1000 >> 8);
  int ticks = 0;
  for (; ticks < 10; ticks++) {
    wait();
    outb(0x20, 0x20); /* end of interrupt */
  }
  say("ticks", ticks);
  finish(1);
}
