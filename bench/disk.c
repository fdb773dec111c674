// What bench/disk.py measures, as PID 1 of a guest with one virtio-blk disk, /dev/vda.
//
// The kernel's command line says what to do: -- COUNT MIB MODULE...
// Everything goes around the guest's page cache (O_DIRECT); more than one request at a time by
// Linux's own asynchronous I/O (io_submit(2)). Prints "end WHAT COUNT NANOSECONDS" lines on the
// console, and powers off.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH_MAX = 16, MIB = 1 << 20 };

static int disk;
static long long size;
static char *buffers[DEPTH_MAX];

static void need(int ok, const char *what) {
  if (ok) return;
  printf("failed %s: %s\n", what, strerror(errno));
  fflush(stdout);
  reboot(RB_POWER_OFF);
}

struct job {
  const char *what;
  int write, random, sync, length, depth;
};

static const struct job jobs[] = {
    {"random_read_4k", 0, 1, 0, 4096, 1},
    {"random_read_4k_by_16", 0, 1, 0, 4096, 16},
    {"random_write_4k", 1, 1, 0, 4096, 1},
    {"random_write_4k_by_16", 1, 1, 0, 4096, 16},
    {"write_4k_and_flush", 1, 1, 1, 4096, 1},
    {"read_MiB_by_4", 0, 0, 0, MIB, 4},
    {"write_MiB_by_4", 1, 0, 0, MIB, 4},
};

static void submit(const struct job *job, aio_context_t context, int slot, long number) {
  long long places = size / job->length;
  long long place = job->random ? (number * 7919LL * 31 + 17) % places : number % places;
  struct iocb request = {
      .aio_data = slot,
      .aio_lio_opcode = job->write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
      .aio_fildes = disk,
      .aio_buf = (unsigned long)buffers[slot],
      .aio_nbytes = job->length,
      .aio_offset = place * job->length,
  };
  struct iocb *requests[] = {&request};
  need(syscall(SYS_io_submit, context, 1, requests) == 1, "io_submit");
}

static void work(const struct job *job, long count) {
  aio_context_t context = 0;
  need(!syscall(SYS_io_setup, DEPTH_MAX, &context), "io_setup");
  long begun = 0, done = 0;
  while (begun < job->depth && begun < count) submit(job, context, begun, begun), begun++;
  while (done < count) {
    struct io_event events[DEPTH_MAX];
    int found = syscall(SYS_io_getevents, context, 1, DEPTH_MAX, events, NULL);
    need(found > 0, "io_getevents");
    for (int i = 0; i < found; i++) {
      need(events[i].res == job->length, job->what);
      if (job->sync) need(!fdatasync(disk), "fdatasync");
      done++;
      if (begun < count) submit(job, context, events[i].data, begun), begun++;
    }
  }
  syscall(SYS_io_destroy, context);
}

int main(int argc, char **argv) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (argc < 3) return 1;
  int count = atoi(argv[1]), mib = atoi(argv[2]);
  for (int i = 3; i < argc; i++) {
    int fd = open(argv[i], O_RDONLY);
    need(fd >= 0 && !syscall(SYS_finit_module, fd, "", 0), argv[i]);
    close(fd);
  }
  mkdir("/dev", 0755);
  need(!mount("dev", "/dev", "devtmpfs", 0, NULL) || errno == EBUSY, "devtmpfs");
  disk = open("/dev/vda", O_RDWR | O_DIRECT);
  need(disk >= 0 && !ioctl(disk, BLKGETSIZE64, &size), "/dev/vda");
  for (int i = 0; i < DEPTH_MAX; i++) {
    need(!posix_memalign((void **)&buffers[i], 4096, MIB), "memory");
    memset(buffers[i], i + 1, MIB);
  }
  for (unsigned j = 0; j < sizeof jobs / sizeof *jobs; j++) {
    long often = jobs[j].length == MIB ? mib : jobs[j].sync ? count / 10 : count;
    work(&jobs[j], often / 10 + 1);  // to be warm
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    work(&jobs[j], often);
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("end %s %ld %ld\n", jobs[j].what, often,
           (b.tv_sec - a.tv_sec) * 1000000000L + b.tv_nsec - a.tv_nsec);
  }
  printf("done\n");
  reboot(RB_POWER_OFF);
  return 0;
}
