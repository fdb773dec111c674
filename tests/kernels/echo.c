/* Says back what is typed, in upper case, until a full stop. */
#include "common.h"

void main(void) {
  print("ready\n");
  for (;;) {
    while (!(inb(0x3FD) & 1)) /* LSR: DR */
      ;
    char c = inb(0x3F8);
    if (c == '.') finish(2);
    put(c >= 'a' && c <= 'z' ? c - 32 : c);
  }
}
