/* Asks fw_cfg for what it has: the signature, the numbers, the directory and its first file. */
#include "common.h"

static uint64_t read_le(uint16_t item, int length) {
  uint64_t value = 0;
  outw(0x510, item);
  for (int i = 0; i < length; i++) value |= (uint64_t)inb(0x511) << 8 * i;
  return value;
}

static uint32_t next_be(int length) {
  uint32_t value = 0;
  while (length--) value = value << 8 | inb(0x511);
  return value;
}

void main(void) {
  outw(0x510, 0);
  print("signature=");
  for (int i = 0; i < 4; i++) put(inb(0x511));
  put('\n');
  say("id", read_le(1, 4));
  say("ram", read_le(3, 8));
  say("cpus", read_le(5, 2));
  outw(0x510, 0x19);
  uint32_t count = next_be(4), size = next_be(4), item = next_be(2);
  next_be(2);
  say("files", count);
  print("name=");
  for (char c; (c = inb(0x511));) put(c);
  put('\n');
  outw(0x510, item);
  print("content=");
  while (size--) put(inb(0x511));
  put('\n');
  say("past the end", inb(0x511));
  finish(0);
}
