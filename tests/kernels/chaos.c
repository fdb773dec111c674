/* The worst of guests, with processors: each does all that a driver may and much that it may not,
   to every device on the PCI bus, in any order. Its command line is where its dice start; it ends with
   3 by port 0xF4. Descriptors lead anywhere in the third and fourth MiB of RAM, or nowhere, so that
   it lives to the end. */
#include "common.h"

enum { ECAM = 0xE0000000, MMIO = 0xD0000000, WINDOW = 0xE1000000, PLAY = 0x200000, STEPS = 1500 };
enum { SLOTS = 12, QUEUES = 6, NOTIFY = 0x3000, TABLE = 0x4000 };

#define AT(type, address) (*(volatile type *)(address))

static uint32_t dice;

static uint32_t pick(uint32_t below) {
  dice = dice * 1664525 + 1013904223; /* whichever processors throw it, it never sticks */
  return (dice >> 4) % below;
}

static uint32_t value(void) {
  static const uint32_t some[] = {0, 1, 2, 4, 16, 0xFF, 0xFFFF, 0x10000, PLAY, PLAY + 0x1000, 0x03FFFFF0,
                                  0x04000000, 0xFEE00000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF};
  return pick(3) ? some[pick(sizeof some / 4)] : pick(0xFFFFFFF) * 16;
}

static uint32_t play(void) { return PLAY + (pick(0x200000 - 0x11000) & ~15u); }

static void write(uint32_t at, int size, uint32_t what) {
  if (size == 0) AT(uint8_t, at) = what;
  if (size == 1) AT(uint16_t, at) = what;
  if (size == 2) AT(uint32_t, at) = what;
}

static uint32_t bar(uint32_t slot) { return AT(uint32_t, ECAM + (slot << 15) + 0x10); }

/* Only where nothing of KVM's own, of RAM's or of the configuration space is written by it. */
static int is_window(uint32_t at) { return at >= WINDOW && at < 0xF0000000; }

static void litter(uint32_t table) {
  for (uint32_t n = 0; n < 64; n++) {
    uint32_t odd = !pick(24);
    AT(uint32_t, table + 16 * n) = odd ? value() : play();
    AT(uint32_t, table + 16 * n + 4) = odd ? pick(2) : 0;
    AT(uint32_t, table + 16 * n + 8) = odd ? value() : 1 + pick(pick(8) ? 600 : 0x10000);
    AT(uint16_t, table + 16 * n + 12) = pick(24) ? pick(4) : 4;
    AT(uint16_t, table + 16 * n + 14) = pick(64) ? (n + 1) % 64 : pick(0xFFFF);
  }
}

/* Headers that the devices know, each at the start of a page. */
static void request(void) {
  uint32_t at = play();
  AT(uint32_t, at) = pick(14), AT(uint32_t, at + 4) = pick(3) ? 0 : value();
  AT(uint32_t, at + 8) = pick(4) ? pick(200) : value(), AT(uint32_t, at + 12) = pick(8) ? 0 : value();
}

static void start(uint32_t base) {
  AT(uint8_t, base + 20) = 0;
  AT(uint8_t, base + 20) = 3;
  for (int half = 0; half < 2; half++) {
    AT(uint32_t, base) = half, AT(uint32_t, base + 8) = half;
    AT(uint32_t, base + 12) = AT(uint32_t, base + 4) & (half ? 1 : pick(0xFFFFFFF) * 16 | 1);
  }
  AT(uint8_t, base + 20) = 11;
  for (uint32_t queue = 0; queue < QUEUES; queue++) {
    uint32_t table = play(), available = play(), used = play();
    litter(table);
    for (uint32_t n = 0; n < 64; n++) AT(uint16_t, available + 4 + 2 * n) = pick(80) ? pick(64) : pick(0xFFFF);
    AT(uint32_t, available) = pick(4) << 16;
    AT(uint16_t, base + 22) = queue;
    if (AT(uint16_t, base + 24) > 64) AT(uint16_t, base + 24) = 64;
    AT(uint16_t, base + 26) = pick(4);
    AT(uint32_t, base + 32) = table, AT(uint32_t, base + 36) = 0;
    AT(uint32_t, base + 40) = available, AT(uint32_t, base + 44) = 0;
    AT(uint32_t, base + 48) = used, AT(uint32_t, base + 52) = 0;
    AT(uint16_t, base + 28) = 1;
  }
  AT(uint8_t, base + 20) = 15;
}

static void ring(uint32_t base) {
  uint32_t queue = pick(QUEUES);
  AT(uint16_t, base + 22) = queue;
  uint32_t available = AT(uint32_t, base + 40);
  if (available >= PLAY && available < PLAY + 0x200000)
    AT(uint16_t, available + 2) += pick(30) ? 1 + pick(3) : pick(0xFFFF);
  for (uint32_t n = 1 + (pick(40) ? 0 : pick(200)); n; n--) AT(uint16_t, base + NOTIFY + 4 * queue) = queue;
}

static void step(void) {
  uint32_t slot = 1 + pick(SLOTS), function = ECAM + (slot << 15), base = bar(slot);
  uint32_t kind = pick(100);
  if (kind < 1) { /* the BAR goes elsewhere, or away: over another's, RAM, the ECAM, KVM's own */
    static const uint32_t places[] = {0, PLAY, ECAM, WINDOW, MMIO, 0xFEC00000, 0xFEE00000, 0xFFFF8000};
    AT(uint32_t, function + 0x10) = pick(2) ? places[pick(8)] : WINDOW + (pick(1 << 11) << 15);
    if (pick(2)) AT(uint16_t, function + 4) = pick(8);
  } else if (kind < 3) { /* and comes back */
    AT(uint16_t, function + 4) = 0;
    AT(uint32_t, function + 0x10) = WINDOW + (slot << 16);
    AT(uint16_t, function + 4) = 6;
  } else if (kind < 7) { /* any register of the function, the window to its BAR among them */
    write(function + 0x40 + pick(0xC0), pick(3), value());
  } else if (!is_window(base) || !(AT(uint16_t, function + 4) & 2)) {
    (void)AT(uint32_t, function);
  } else if (kind < 15) {
    start(base);
  } else if (kind < 19) {
    AT(uint8_t, base + 20) = pick(4) ? 0 : pick(256); /* reset, whatever is under way */
  } else if (kind < 29) { /* any register, any width */
    uint32_t at = pick(pick(2) ? 0x40 : 0x8000);
    if (at < TABLE - 4 || at >= TABLE + 0x1000) write(base + at, pick(3), value());
    (void)AT(uint32_t, base + pick(0x8000 - 4));
  } else if (kind < 31) { /* vectors */
    uint32_t entry = base + TABLE + 16 * pick(8);
    AT(uint32_t, entry) = pick(3) ? 0xFEE00000 + (pick(4) << 12) : value();
    AT(uint32_t, entry + 4) = pick(8) ? 0 : value();
    AT(uint32_t, entry + 8) = value() & ~0x700; /* no NMI and no INIT, which would end it early */
    AT(uint32_t, entry + 12) = pick(2);
    AT(uint16_t, function + 0x42) = pick(4) << 14;
  } else if (kind < 41) {
    request();
  } else {
    ring(base);
  }
}

/* The other processors come from real mode, by way of page 8, and do the same for ever. */
static uint64_t gdt[] = {0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF};
static struct { uint16_t limit; uint32_t base; } __attribute__((packed)) gdtr = {sizeof gdt - 1, (uint32_t)gdt};
static uint8_t stacks[4][4096] __attribute__((aligned(16)));
extern char trampoline[], table_register[], trampoline_end[];
__asm__(".pushsection .text\n"
        ".code16\n"
        "trampoline: cli\n"
        "mov %cs, %ax\n"
        "mov %ax, %ds\n"
        "lgdtl table_register - trampoline\n"
        "mov %cr0, %eax\n"
        "or $1, %eax\n"
        "mov %eax, %cr0\n"
        "ljmpl $8, $others\n"
        "table_register: .skip 6\n"
        "trampoline_end:\n"
        ".code32\n"
        "others: mov $16, %ax\n"
        "mov %ax, %ds\n"
        "mov %ax, %es\n"
        "mov %ax, %ss\n"
        "mov $4096, %esp\n"
        "lock xadd %esp, stack_next\n"
        "call other\n"
        ".popsection\n");
uint32_t stack_next = (uint32_t)stacks + 4096;
volatile uint32_t others_playing;

void other(void) {
  __asm__ volatile("lock incl %0" : "+m"(others_playing));
  for (;;) step();
}

static void wake_others(void) {
  char *page = (char *)0x8000;
  for (char *from = trampoline; from < trampoline_end; from++) *page++ = *from;
  char *where = (char *)0x8000 + (table_register - trampoline);
  for (uint32_t n = 0; n < sizeof gdtr; n++) where[n] = ((char *)&gdtr)[n];
  outw(0x510, 5); /* fw_cfg: how many processors there are */
  uint32_t others = inb(0x511) - 1;
  AT(uint32_t, 0xFEE000F0) = 0x1FF;
  AT(uint32_t, 0xFEE00300) = 0xC4500; /* INIT, to all but this one */
  for (int n = 0; n < 100; n++) inb(0x80);
  AT(uint32_t, 0xFEE00300) = 0xC4608; /* SIPI, to page 8 */
  while (others_playing < others) __asm__ volatile("pause");
}

void main(uint32_t magic, uint32_t *info) {
  (void)magic;
  for (const char *c = (const char *)info[4]; *c; c++) dice = dice * 31 + *c;
  wake_others();
  for (uint32_t n = 0; n < STEPS; n++) step();
  finish(3);
}
