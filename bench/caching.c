// What bench/caching.py measures, inside the guest: each thing, in each directory, in turn.
//
// usage: caching ROUNDS FILES MIB DIRECTORY[:large]...
// ":large" does only what concerns the large file.
// Prints "begin NAME" and "end NAME ROUND WHAT COUNT NANOSECONDS", and waits for a line after each,
// so that whoever reads can look at its counters meanwhile.

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int files, mib, turn;
static const char *directory;
static char page[4096], block[1 << 20];

static void need(int ok, const char *what) {
  if (!ok) {
    perror(what);
    exit(1);
  }
}

static const char *path(const char *format, int number) {
  static char text[4096];
  int length = snprintf(text, sizeof text, "%s/", directory);
  snprintf(text + length, sizeof text - length, format, number);
  return text;
}

static void wait_for_host(void) {
  fflush(stdout);
  need(getchar() == '\n', "stdin");
}

static void forget(void) {
  sync();
  int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
  need(fd >= 0 && write(fd, "3", 1) == 1, "drop_caches");
  close(fd);
}

static void stat_all(void) {
  struct stat st;
  for (int i = 0; i < files; i++) need(!stat(path("small/file%d", i), &st), "stat");
}

static void read_all(void) {
  for (int i = 0; i < files; i++) {
    int fd = open(path("small/file%d", i), O_RDONLY);
    need(fd >= 0 && read(fd, page, sizeof page) == sizeof page, "read");
    close(fd);
  }
}

static void read_large(void) {
  int fd = open(path("large", 0), O_RDONLY);
  for (int i = 0; i < mib; i++) need(read(fd, block, sizeof block) == sizeof block, "large");
  close(fd);
}

static void write_large(void) {
  int fd = open(path("new-large", 0), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  for (int i = 0; i < mib; i++) need(write(fd, block, sizeof block) == sizeof block, "write");
  close(fd);
}

static void flush_large(void) {
  int fd = open(path("new-large", 0), O_WRONLY);
  need(!fsync(fd), "fsync");
  close(fd);
}

static void create_all(void) {
  for (int i = 0; i < files; i++) {
    const char *name = path("small/new%d", i);
    int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0644);
    need(fd >= 0 && write(fd, page, sizeof page) == sizeof page, "create");
    close(fd);
    need(!unlink(name), "unlink");
  }
}

// Each turn appends to files that no turn has changed: the first write copies a file up.
enum { CHANGES = 20 };

static void change_some(void) {
  for (int i = 0; i < CHANGES; i++) {
    int fd = open(path("changed/file%d", turn * CHANGES + i), O_WRONLY | O_APPEND);
    need(fd >= 0 && write(fd, page, 1) == 1, "append");
    close(fd);
  }
}

static void run(char *const argv[]) {
  int child = vfork();
  if (child == 0) {
    int null = open("/dev/null", O_WRONLY);
    dup2(null, 1);
    execvp(argv[0], argv);
    _exit(127);
  }
  int status;
  need(waitpid(child, &status, 0) == child && status == 0, argv[0]);
}

static void git_status(void) {
  char *where = strdup(path("repository", 0));
  run((char *[]){"git", "-c", "safe.directory=*", "-C", where, "status", "--porcelain", NULL});
  free(where);
}

static void nothing(void) {}

enum { EACH_MIB = -1, EACH_FILE };

static const struct {
  const char *what;
  void (*before)(void);
  void (*work)(void);
  int each;  // what is done: for each file, for each MiB, or so often
} things[] = {
    {"first_stat", forget, stat_all, EACH_FILE},
    {"stat_again", stat_all, stat_all, EACH_FILE},
    {"first_read_4k", forget, read_all, EACH_FILE},
    {"read_4k_again", read_all, read_all, EACH_FILE},
    {"create_write_unlink", nothing, create_all, EACH_FILE},
    {"first_change", nothing, change_some, CHANGES},
    {"read_MiB", forget, read_large, EACH_MIB},
    {"read_MiB_again", read_large, read_large, EACH_MIB},
    {"write_MiB", nothing, write_large, EACH_MIB},
    {"fsync_MiB", nothing, flush_large, EACH_MIB},
    {"git_status", forget, git_status, 1},
    {"git_status_again", git_status, git_status, 1},
};

int main(int argc, char **argv) {
  int rounds = atoi(argv[1]);
  files = atoi(argv[2]), mib = atoi(argv[3]);
  memset(block, 'x', sizeof block);
  for (turn = 0; turn <= rounds; turn++) {
    for (unsigned t = 0; t < sizeof things / sizeof *things; t++)
      for (int d = 4; d < argc; d++) {
        static char argument[4096];
        snprintf(argument, sizeof argument, "%s", argv[d]);
        char *colon = strchr(argument, ':');
        if (colon && things[t].each != EACH_MIB) continue;
        if (colon) *colon = 0;
        directory = argument;
        const char *name = strrchr(directory, '/') + 1;
        things[t].before();
        printf("begin %s\n", name);
        wait_for_host();
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        things[t].work();
        clock_gettime(CLOCK_MONOTONIC, &b);
        long ns = (b.tv_sec - a.tv_sec) * 1000000000L + b.tv_nsec - a.tv_nsec;
        int each = things[t].each;
        printf("end %s %d %s %d %ld\n", name, turn, things[t].what,
               each == EACH_FILE ? files : each == EACH_MIB ? mib : each, ns);
        wait_for_host();
        if (things[t].work == flush_large) unlink(path("new-large", 0));
      }
  }
  return 0;
}
