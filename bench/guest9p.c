// What bench/guest9p.py measures, as PID 1 of a guest with two 9P devices: "root" has the programs,
// "bench" is what everything is done in, mounted at /root/mnt once with each cache policy.
//
// The kernel's command line says what to do: -- FILES MIB MODULE...
// Prints "begin" and "end CACHE WHAT COUNT NANOSECONDS" lines on the console, and powers off.

#include <dirent.h>
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

#define AT "/root/mnt/"
enum { ENTRIES = 1000 };

static int files, mib;
static char page[4096], block[1 << 20];

static void need(int ok, const char *what) {
  if (ok) return;
  printf("failed %s: %s\n", what, strerror(errno));
  fflush(stdout);
  reboot(RB_POWER_OFF);
}

static const char *path(const char *format, int number) {
  static char text[256];
  snprintf(text, sizeof text, format, number);
  return text;
}

static void forget(void) {
  sync();
  int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
  need(fd >= 0 && write(fd, "3", 1) == 1, "drop_caches");
  close(fd);
}

static void stat_files(void) {
  struct stat st;
  for (int i = 0; i < files; i++) need(!stat(path(AT "small/file%d", i), &st), "stat");
}

static void read_files(void) {
  for (int i = 0; i < files; i++) {
    int fd = open(path(AT "small/file%d", i), O_RDONLY);
    need(fd >= 0 && read(fd, page, sizeof page) == sizeof page, "read");
    close(fd);
  }
}

static void create_files(void) {
  for (int i = 0; i < files; i++) {
    const char *name = path(AT "small/new%d", i);
    int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0644);
    need(fd >= 0 && write(fd, page, sizeof page) == sizeof page, "create");
    close(fd);
    need(!unlink(name), "unlink");
  }
}

static void read_directory(void) {
  DIR *directory = opendir(AT "many");
  need(directory != NULL, "opendir");
  int count = 0;
  while (readdir(directory)) count++;
  need(count == ENTRIES + 2, "readdir");
  closedir(directory);
}

static void read_large(void) {
  int fd = open(AT "large", O_RDONLY);
  for (int i = 0; i < mib; i++) need(read(fd, block, sizeof block) == sizeof block, "large");
  close(fd);
}

static void write_large(void) {
  int fd = open(AT "new-large", O_WRONLY | O_CREAT | O_TRUNC, 0644);
  for (int i = 0; i < mib; i++) need(write(fd, block, sizeof block) == sizeof block, "write");
  need(!close(fd), "close");
  need(!unlink(AT "new-large"), "unlink");
}

static void git_status(void) {
  pid_t child = fork();
  if (child == 0) {
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 2; fd++) dup2(null, fd);
    need(!chroot("/root") && !chdir("/mnt/repository"), "chroot");
    setenv("HOME", "/", 1);
    char *argv[] = {"git", "-c", "safe.directory=*", "status", "--porcelain", NULL};
    execv("/usr/bin/git", argv);
    _exit(127);
  }
  int status;
  need(waitpid(child, &status, 0) == child && status == 0, "git status");
}

enum { EACH_MIB = -1, EACH_FILE };

static const struct {
  const char *what;
  void (*work)(void);
  int each;  // what is counted: files, MiB, or just this many
} things[] = {
    {"stat", stat_files, EACH_FILE},
    {"open_read_4k_close", read_files, EACH_FILE},
    {"create_write_unlink", create_files, EACH_FILE},
    {"readdir_1000", read_directory, 1},
    {"read_MiB", read_large, EACH_MIB},
    {"write_MiB", write_large, EACH_MIB},
    {"git_status", git_status, 1},
};

static void measure(const char *cache) {
  char options[100];
  snprintf(options, sizeof options, "trans=virtio,version=9p2000.L,msize=512000,cache=%s", cache);
  need(!mount("bench", "/root/mnt", "9p", 0, options), "mount");
  git_status();  // git itself need not be read while the clock runs
  for (unsigned t = 0; t < sizeof things / sizeof *things; t++) {
    forget();
    if (things[t].work == git_status) {  // its tree is cold, the program is not
      need(!umount("/root/mnt"), "umount");
      need(!mount("bench", "/root/mnt", "9p", 0, options), "mount");
      int fd = open("/root/usr/bin/git", O_RDONLY);
      while (read(fd, block, sizeof block) > 0) continue;
      close(fd);
    }
    printf("begin\n");
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    things[t].work();
    clock_gettime(CLOCK_MONOTONIC, &b);
    long ns = (b.tv_sec - a.tv_sec) * 1000000000L + b.tv_nsec - a.tv_nsec;
    int each = things[t].each;
    printf("end %s %s %d %ld\n", cache, things[t].what,
           each == EACH_FILE ? files : each == EACH_MIB ? mib : each, ns);
  }
  need(!umount("/root/mnt"), "umount");
}

int main(int argc, char **argv) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (argc < 3) return 1;
  files = atoi(argv[1]), mib = atoi(argv[2]);
  for (int i = 3; i < argc; i++) {
    int fd = open(argv[i], O_RDONLY);
    need(fd >= 0 && !syscall(SYS_finit_module, fd, "", 0), argv[i]);
    close(fd);
  }
  mkdir("/proc", 0755), mkdir("/root", 0755);
  need(!mount("proc", "/proc", "proc", 0, NULL), "proc");
  const char *options = "trans=virtio,version=9p2000.L,msize=512000,cache=loose";
  need(!mount("root", "/root", "9p", MS_RDONLY, options), "mount");
  need(!mount("proc", "/root/proc", "proc", 0, NULL), "proc");
  measure("none");
  measure("loose");
  printf("done\n");
  sync();
  reboot(RB_POWER_OFF);
  return 0;
}
