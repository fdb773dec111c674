// What bench/roots.py measures, in each of its guests: some commands, each by the monotonic clock.
//
//   roots                          measure: what tinyvmm runs
//   init KIND DEVICE MODULE...     as PID 1 of QEMU's guests: insert the modules, mount the root, of
//                                  KIND 9p, ext4 or KIND+overlay, and measure in there
//
// All of it, or what begins with ONLY, REPEAT times, if those are in the environment. Prints "begin SECONDS REQUESTS SECTORS" (of
// the kernel's life), then "end WHAT NANOSECONDS STATUS REQUESTS SECTORS" of each command and "done";
// what a command prints goes to /dev/null. REQUESTS and SECTORS are what was read of the first
// virtio disk meanwhile, which is the root's if it has one.

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PYTHON "python3 -I /bench/imports.py"

static const struct { const char *what, *command; } COMMANDS[] = {
    {"find-cold", "find / -xdev -type f | wc -l"},
    {"find-warm", "find / -xdev -type f | wc -l"},
    {"git-cold", "git -C /bench/project status --short"},
    {"git-warm", "git -C /bench/project status --short"},
    {"python-cold", PYTHON},
    {"python-warm", PYTHON},
    {"make-cold", "make -s -C /bench/c"},
    {"make-warm", "make -s -C /bench/c clean all"},
};

static void need(int ok, const char *what) {
  if (ok) return;
  printf("failed %s: %s\n", what, strerror(errno));
  fflush(stdout);
  if (getpid() == 1) reboot(RB_POWER_OFF);
  exit(1);
}

static long long now(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

struct reads { unsigned long long requests, sectors; };

static struct reads reads(void) {  // Documentation/block/stat.rst
  struct reads r = {0, 0};
  FILE *file = fopen("/sys/block/vda/stat", "r");
  if (!file) return r;
  need(fscanf(file, "%llu %*u %llu", &r.requests, &r.sectors) == 2, "/sys/block/vda/stat");
  fclose(file);
  return r;
}

static void forget(void) {
  sync();
  int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
  need(fd >= 0 && write(fd, "3", 1) == 1, "drop_caches");
  close(fd);
}

// Have the host give us this memory now, and the kernel keep it: else whichever command comes upon
// a page first would pay for the host's finding and clearing it, which says nothing of a root.
static void warm_memory(void) {
  size_t size = 256 << 20;
  char *memory = malloc(size);
  need(memory != NULL, "malloc");
  for (size_t i = 0; i < size; i += 4096) ((volatile char *)memory)[i] = 1;
  free(memory);
}

static void measure(void) {
  setenv("PATH", "/usr/local/bin:/usr/bin:/bin", 1);
  setenv("HOME", "/tmp", 1);
  unsetenv("PYTHONPATH");
  struct reads before = reads();
  printf("begin %.3f %llu %llu\n", now(CLOCK_BOOTTIME) / 1e9, before.requests, before.sectors);
  fflush(stdout);
  warm_memory();
  const char *repeat = getenv("REPEAT"), *only = getenv("ONLY");
  size_t count = sizeof COMMANDS / sizeof *COMMANDS, times = repeat ? atoi(repeat) : 1;
  for (size_t n = 0; n < count * times; n++) {
    size_t i = n % count;
    if (only && strncmp(COMMANDS[i].what, only, strlen(only))) continue;
    if (strstr(COMMANDS[i].what, "cold")) forget();
    before = reads();
    long long begin = now(CLOCK_MONOTONIC);
    pid_t child = fork();
    need(child >= 0, "fork");
    if (!child) {
      int null = open("/dev/null", O_RDWR);
      dup2(null, 0), dup2(null, 1);
      execl("/bin/sh", "sh", "-c", COMMANDS[i].command, (char *)NULL);
      _exit(127);
    }
    int status;
    need(waitpid(child, &status, 0) == child, "wait");
    long long took = now(CLOCK_MONOTONIC) - begin;
    struct reads after = reads();
    printf("end %s %lld %d %llu %llu\n", COMMANDS[i].what, took, status,
           after.requests - before.requests, after.sectors - before.sectors);
    fflush(stdout);
  }
  puts("done");
  fflush(stdout);
}

static void insert(const char *path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  need(fd >= 0, path);
  need(!syscall(SYS_finit_module, fd, "", 0) || errno == EEXIST, path);
  close(fd);
}

static void mount_lower(const char *type, const char *device) {
  mkdir("/lower", 0755);
  const char *options = "trans=virtio,version=9p2000.L,msize=512000,cache=loose";
  need(!mount(device, "/lower", type, MS_RDONLY, strcmp(type, "9p") ? NULL : options), type);
}

static void mount_overlay(void) {
  // What is written goes to the guest's RAM, by the options that tinyvmm gives.
  mkdir("/scratch", 0755);
  need(!mount("tmpfs", "/scratch", "tmpfs", 0, NULL), "tmpfs");
  mkdir("/scratch/upper", 0755), mkdir("/scratch/work", 0755);
  const char *options =
      "lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work,redirect_dir=on";
  need(!mount("overlay", "/root", "overlay", 0, options), "overlay");
}

int main(int argc, char **argv) {
  if (argc > 3) {
    mkdir("/dev", 0755), mkdir("/root", 0755);
    for (int i = 3; i < argc; i++) insert(argv[i]);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    char *plus = strchr(argv[1], '+');
    if (plus) {
      *plus = 0;
      mount_lower(argv[1], argv[2]);
      mount_overlay();
    } else {
      need(!mount(argv[2], "/root", argv[1], 0, NULL), argv[1]);
    }
    need(!mount("devtmpfs", "/root/dev", "devtmpfs", 0, NULL), "/dev");
    need(!mount("proc", "/root/proc", "proc", 0, NULL), "/proc");
    need(!mount("sysfs", "/root/sys", "sysfs", 0, NULL), "/sys");
    need(!chroot("/root") && !chdir("/"), "chroot");
  }
  measure();
  if (getpid() == 1) {
    sync();
    reboot(RB_POWER_OFF);
  }
}
