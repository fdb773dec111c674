/* Reads a disk's first sector over and over, through virtio-pci, asleep between doorbell and
   interrupt. Port 0x80 is written when the row of reads begins and when it ends. */
#include "common.h"

enum { ECAM = 0xE0000000, VIRTIO = 0x1AF4, BLOCK = 0x1042, CAP_VENDOR = 9, CAP_MSIX = 17 };
enum { COMMON = 1, NOTIFY = 2 };                    /* cfg_type, virtio 1.2, 4.1.4 */
enum { SIZE = 4, NEXT = 1, WRITE = 2, READS = 1000, VECTOR = 0x30 };

static struct { uint16_t low, selector, flags, high; } idt[VECTOR + 1];
static struct { uint64_t addr; uint32_t len; uint16_t flags, next; } desc[SIZE]
    __attribute__((aligned(16)));
static volatile struct { uint16_t flags, idx, ring[SIZE]; } avail;
static volatile struct { uint16_t flags, idx; struct { uint32_t id, len; } ring[SIZE]; } used
    __attribute__((aligned(4)));
static struct { uint32_t type, reserved; uint64_t sector; } header;
static volatile uint8_t data[512], status;

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

#define AT(type, address) (*(volatile type *)(address))

static void take_interrupts(void) {
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
  AT(uint32_t, 0xFEE000F0) = 0x1FF;
}

static void place(uint32_t common, uint32_t offset, volatile void *what) {
  AT(uint32_t, common + offset) = (uint32_t)what;
  AT(uint32_t, common + offset + 4) = 0;
}

void main(void) {
  uint32_t function = 0, bar, common = 0, bell = 0, multiplier = 0, msix = 0;
  for (uint32_t slot = 0; slot < 32 && !function; slot++)
    if (AT(uint32_t, ECAM + (slot << 15)) == (BLOCK << 16 | VIRTIO)) function = ECAM + (slot << 15);
  if (!function) finish(1);
  bar = AT(uint32_t, function + 0x10);
  for (uint32_t at = AT(uint8_t, function + 0x34); at; at = AT(uint8_t, function + at + 1)) {
    uint8_t id = AT(uint8_t, function + at), type = AT(uint8_t, function + at + 3);
    if (id == CAP_MSIX) msix = function + at;
    if (id == CAP_VENDOR && type == COMMON) common = bar + AT(uint32_t, function + at + 8);
    if (id == CAP_VENDOR && type == NOTIFY) {
      bell = bar + AT(uint32_t, function + at + 8);
      multiplier = AT(uint32_t, function + at + 16);
    }
  }
  take_interrupts();
  uint32_t vector = bar + AT(uint32_t, msix + 4) + 16; /* the table's second */
  AT(uint32_t, vector) = 0xFEE00000, AT(uint32_t, vector + 4) = 0;
  AT(uint32_t, vector + 8) = VECTOR, AT(uint32_t, vector + 12) = 0;
  AT(uint16_t, msix + 2) |= 1 << 15;

  AT(uint8_t, common + 20) = 0;
  AT(uint8_t, common + 20) = 3;                     /* ACKNOWLEDGE, DRIVER */
  AT(uint32_t, common + 8) = 1, AT(uint32_t, common + 12) = 1; /* VIRTIO_F_VERSION_1 */
  AT(uint8_t, common + 20) = 11;                    /* FEATURES_OK */
  AT(uint16_t, common + 22) = 0, AT(uint16_t, common + 24) = SIZE, AT(uint16_t, common + 26) = 1;
  place(common, 32, desc), place(common, 40, &avail), place(common, 48, &used);
  bell += AT(uint16_t, common + 30) * multiplier;
  AT(uint16_t, common + 28) = 1;
  AT(uint8_t, common + 20) = 15;                    /* DRIVER_OK */

  desc[0].addr = (uint32_t)&header, desc[0].len = sizeof header, desc[0].flags = NEXT, desc[0].next = 1;
  desc[1].addr = (uint32_t)data, desc[1].len = sizeof data, desc[1].flags = NEXT | WRITE, desc[1].next = 2;
  desc[2].addr = (uint32_t)&status, desc[2].len = 1, desc[2].flags = WRITE;
  uint32_t sum = 0, failed = 0;
  outb(0x80, 1);
  for (uint32_t n = 0; n < READS; n++) {
    status = 0xFF;
    avail.ring[n % SIZE] = 0;
    avail.idx = n + 1;
    AT(uint16_t, bell) = 0;
    do {
      wait();
      AT(uint32_t, 0xFEE000B0) = 0;                 /* end of interrupt */
    } while (used.idx != (uint16_t)(n + 1));
    failed += status != 0;
    sum += data[n % 512];
    data[n % 512] = 0;
  }
  outb(0x80, 2);
  say("failed", failed);
  say("sum", sum);
  finish(0);
}
