// Whether a file reads the same by read(2) and through a mapping, whichever it is written by.
//
// usage: mapped FILE [msync]
// With "msync" what was written through the mapping is flushed before it is read, which only a file
// system without a page cache of its own for read(2) needs. Prints "agreed", or the first difference.

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 5 };

static int fd;
static unsigned char *map, data[PAGE * PAGES];

static void need(int ok, const char *what) {
  if (!ok) {
    perror(what);
    exit(1);
  }
}

static void same(const char *when) {
  need(pread(fd, data, sizeof data, 0) == sizeof data, "pread");
  for (int i = 0; i < PAGE * PAGES; i++)
    if (data[i] != map[i]) {
      printf("%s: byte %d is %d by read and %d when mapped\n", when, i, data[i], map[i]);
      exit(1);
    }
}

int main(int argc, char **argv) {
  int flush = argc > 2 && !strcmp(argv[2], "msync");
  fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0644);
  for (int i = 0; i < PAGE * PAGES; i++) data[i] = i * 7 + i / PAGE;
  need(write(fd, data, sizeof data) == sizeof data, "write");
  map = mmap(0, sizeof data, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  need(map != MAP_FAILED, "mmap");
  same("written");

  for (int i = 0; i < PAGE * PAGES; i += 1000) map[i] ^= 0x55;
  if (flush) need(!msync(map, sizeof data, MS_SYNC), "msync");
  same("changed through the mapping");

  unsigned char patch[3000];
  memset(patch, 0xAA, sizeof patch);
  need(pwrite(fd, patch, sizeof patch, PAGE - 100) == sizeof patch, "pwrite");
  same("changed by pwrite");
  need(map[PAGE - 100] == 0xAA && map[PAGE * 2 - 1] != 0xAA, "where it was written");

  need(!ftruncate(fd, PAGE + 10) && !ftruncate(fd, sizeof data), "ftruncate");
  same("cut and grown");
  need(map[PAGE + 9] == 0xAA && map[PAGE + 10] == 0 && map[PAGE * 3] == 0, "zeroes where it grew");

  // What is written after the name is gone is still in the file.
  need(!unlink(argv[1]), "unlink");
  memset(map + PAGE, 'u', PAGE);
  if (flush) need(!msync(map, sizeof data, MS_SYNC), "msync");
  same("unlinked");
  puts("agreed");
  return 0;
}
