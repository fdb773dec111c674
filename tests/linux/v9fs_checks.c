// What a guest sees of its file systems: each check in a directory of its own, below each directory
// that is named. Prints "ok CHECK" or "FAIL CHECK: line N, ERROR" for each; run as root.
// On a disk's file system everything is ok.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#define CHECK(what) \
  do { \
    errno = 0; \
    if (!(what)) return __LINE__; \
  } while (0)
#define FAILS(what, error) CHECK((what) == -1 && errno == (error))

enum { USER = 1000 };

static char buffer[8192];

static int make(const char *name, const char *text) {
  int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0644);
  if (fd >= 0 && write(fd, text, strlen(text)) != (ssize_t)strlen(text)) return -1;
  return fd;
}

static int holds(int fd, const char *text) {
  ssize_t size = pread(fd, buffer, sizeof buffer, 0);
  return size == (ssize_t)strlen(text) && !memcmp(buffer, text, size);
}

static int file_holds(const char *name, const char *text) {
  int fd = open(name, O_RDONLY), found = fd >= 0 && holds(fd, text);
  close(fd);
  return found;
}

// Whatever can be done to an open file that holds "contents".
static int whole(int fd) {
  struct stat st;
  CHECK(holds(fd, "contents"));
  CHECK(pwrite(fd, "C", 1, 0) == 1);
  CHECK(holds(fd, "Contents"));
  CHECK(!ftruncate(fd, 4));
  CHECK(holds(fd, "Cont"));
  CHECK(!fchmod(fd, 0604));
  CHECK(!fsetxattr(fd, "user.key", "value", 5, 0));
  CHECK(fgetxattr(fd, "user.key", buffer, sizeof buffer) == 5 && !memcmp(buffer, "value", 5));
  CHECK(!fstat(fd, &st) && st.st_size == 4 && (st.st_mode & 07777) == 0604);
  CHECK(!fsync(fd) && !fdatasync(fd));
  return 0;
}

static int unlinked_while_open(void) {
  struct stat st;
  int fd = make("file", "contents"), failed;
  CHECK(fd >= 0 && !unlink("file"));
  if ((failed = whole(fd))) return failed;
  CHECK(!fstat(fd, &st) && st.st_nlink == 0);
  CHECK(access("file", F_OK) == -1 && errno == ENOENT);
  return close(fd);
}

static int renamed_while_open(void) {
  int fd = make("file", "contents"), failed;
  CHECK(fd >= 0 && !rename("file", "other"));
  int successor = make("file", "new");
  if ((failed = whole(fd))) return failed;
  CHECK(holds(successor, "new") && file_holds("other", "Cont"));
  return close(fd) | close(successor);
}

static int replaced_while_open(void) {
  int fd = make("file", "contents"), failed;
  CHECK(fd >= 0 && !close(make("other", "new")) && !rename("other", "file"));
  if ((failed = whole(fd))) return failed;
  CHECK(file_holds("file", "new"));
  return close(fd);
}

static int rename_rules(void) {
  CHECK(!mkdir("empty", 0755) && !mkdir("full", 0755) && !close(make("full/file", "x")));
  CHECK(!close(make("file", "x")));
  FAILS(rename("file", "empty"), EISDIR);
  FAILS(rename("empty", "file"), ENOTDIR);
  FAILS(rename("empty", "full"), ENOTEMPTY);
  FAILS(rename("full", "full/below"), EINVAL);
  FAILS(rename("nothing", "file"), ENOENT);
  CHECK(!rename("full", "empty") && file_holds("empty/file", "x"));
  CHECK(!rename("empty/file", "file"));
  FAILS(rmdir("file"), ENOTDIR);
  FAILS(unlink("empty"), EISDIR);
  return rmdir("empty");
}

static int directory_renamed_with_files_open(void) {
  CHECK(!mkdir("old", 0755) && !mkdir("old/sub", 0755));
  int fd = make("old/sub/file", "contents"), at = open("old/sub", O_RDONLY | O_DIRECTORY), failed;
  CHECK(fd >= 0 && at >= 0 && !rename("old", "new"));
  if ((failed = whole(fd))) return failed;
  int made = openat(at, "made", O_RDWR | O_CREAT, 0644);
  CHECK(made >= 0 && write(made, "here", 4) == 4 && !close(made));
  CHECK(file_holds("new/sub/made", "here") && file_holds("new/sub/file", "Cont"));
  return close(fd) | close(at);
}

static int hard_links(void) {
  struct stat a, b;
  int one = make("one", "contents");
  CHECK(one >= 0 && !link("one", "two"));
  int two = open("two", O_RDWR);
  CHECK(!fstat(one, &a) && !stat("two", &b) && a.st_ino == b.st_ino && b.st_nlink == 2);
  CHECK(pwrite(two, "C", 1, 0) == 1 && !fsync(two));
  CHECK(holds(one, "Contents"));
  FAILS(link("one", "two"), EEXIST);
  CHECK(!unlink("one") && file_holds("two", "Contents"));
  return close(one) | close(two);
}

static int appending(void) {
  int one = open("file", O_WRONLY | O_CREAT | O_APPEND, 0644), two = open("file", O_WRONLY | O_APPEND);
  CHECK(one >= 0 && two >= 0);
  CHECK(write(one, "a", 1) == 1 && write(two, "b", 1) == 1 && write(one, "c", 1) == 1);
  CHECK(!close(one) && !close(two));
  CHECK(file_holds("file", "abc"));
  return 0;
}

static int created_read_only(void) {
  int fd = open("file", O_RDWR | O_CREAT | O_EXCL, 0444);
  CHECK(fd >= 0 && write(fd, "once", 4) == 4 && !close(fd));
  CHECK(file_holds("file", "once"));
  FAILS(open("file", O_RDWR | O_CREAT | O_EXCL, 0444), EEXIST);
  return 0;
}

static int modes(void) {
  struct stat st;
  struct sockaddr_un address = {AF_UNIX, "socket"};
  int sock = socket(AF_UNIX, SOCK_STREAM, 0);
  CHECK(!bind(sock, (struct sockaddr *)&address, sizeof address));
  CHECK(!mkfifo("fifo", 0600) && !close(make("file", "x")) && !mkdir("directory", 0700));
  const char *names[] = {"socket", "fifo", "file", "directory"};
  for (int i = 0; i < 4; i++) {
    CHECK(!chmod(names[i], 0) && !stat(names[i], &st) && (st.st_mode & 07777) == 0);
    CHECK(!chmod(names[i], 01753) && !stat(names[i], &st) && (st.st_mode & 07777) == 01753);
  }
  return close(sock);
}

static int special_files(void) {
  struct stat st;
  CHECK(!mknod("null", S_IFCHR | 0666, makedev(1, 3)) && !mknod("block", S_IFBLK | 0600, makedev(7, 200)));
  CHECK(!stat("null", &st) && S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3));
  CHECK(!stat("block", &st) && S_ISBLK(st.st_mode) && st.st_rdev == makedev(7, 200));
  CHECK(!mkfifo("fifo", 0600));
  int reader = open("fifo", O_RDONLY | O_NONBLOCK), writer = open("fifo", O_WRONLY);
  CHECK(reader >= 0 && write(writer, "through", 7) == 7 && read(reader, buffer, 100) == 7);
  return close(reader) | close(writer);
}

static int symlinks(void) {
  struct stat st;
  const char *targets[] = {"file", "../../..", "/", "\xff\n odd //x/", "nothing"};
  CHECK(!close(make("file", "x")));
  for (int i = 0; i < 5; i++) {
    CHECK(!symlink(targets[i], "link"));
    CHECK(readlink("link", buffer, sizeof buffer) == (ssize_t)strlen(targets[i]));
    CHECK(!memcmp(buffer, targets[i], strlen(targets[i])) && !lstat("link", &st) && S_ISLNK(st.st_mode));
    CHECK(!unlink("link"));
  }
  CHECK(!symlink("file", "link") && file_holds("link", "x"));
  FAILS(open("link", O_RDONLY | O_NOFOLLOW), ELOOP);
  CHECK(!symlink("loop", "loop"));
  FAILS(open("loop", O_RDONLY), ELOOP);
  return 0;
}

static int removed_directory(void) {
  CHECK(!mkdir("gone", 0755));
  int at = open("gone", O_RDONLY | O_DIRECTORY);
  CHECK(at >= 0 && !rmdir("gone"));
  FAILS(openat(at, "file", O_RDWR | O_CREAT, 0644), ENOENT);
  FAILS(mkdirat(at, "directory", 0755), ENOENT);
  DIR *listing = fdopendir(at);
  struct dirent *entry;
  while ((entry = readdir(listing))) CHECK(entry->d_name[0] == '.');
  return closedir(listing);
}

static int removed_while_listed(void) {
  enum { COUNT = 300 };
  char name[20];
  CHECK(!mkdir("many", 0755) && !chdir("many"));
  for (int i = 0; i < COUNT; i++) {
    sprintf(name, "%d", i);
    CHECK(!mknod(name, S_IFREG | 0600, 0));
  }
  DIR *listing = opendir(".");
  struct dirent *entry;
  int found = 0;
  while ((entry = readdir(listing)))
    if (entry->d_name[0] != '.') CHECK(!unlink(entry->d_name) && ++found);
  CHECK(found == COUNT && !closedir(listing) && !chdir("..") && !rmdir("many"));
  return 0;
}

static int listing_can_be_sought(void) {
  char name[20], after[256];
  for (int i = 0; i < 40; i++) {
    sprintf(name, "%d", i);
    CHECK(!mknod(name, S_IFREG | 0600, 0));
  }
  DIR *listing = opendir(".");
  for (int i = 0; i < 20; i++) CHECK(readdir(listing));
  long place = telldir(listing);
  struct dirent *entry = readdir(listing);
  CHECK(entry);
  strcpy(after, entry->d_name);
  while (readdir(listing)) continue;
  seekdir(listing, place);
  CHECK((entry = readdir(listing)) && !strcmp(entry->d_name, after));
  rewinddir(listing);
  int count = 0;
  while (readdir(listing)) count++;
  CHECK(count == 42);
  return closedir(listing);
}

static int names(void) {
  char longest[257];
  memset(longest, 'n', 256);
  longest[256] = 0;
  FAILS(mkdir(longest, 0755), ENAMETOOLONG);
  longest[255] = 0;
  const char *all[] = {longest, "\xff\xfe", "new\nline", "a b", "...", "\\"};
  for (int i = 0; i < 6; i++) CHECK(!mkdir(all[i], 0755));
  DIR *listing = opendir(".");
  struct dirent *entry;
  int found = 0;
  while ((entry = readdir(listing)))
    for (int i = 0; i < 6; i++) found += !strcmp(entry->d_name, all[i]);
  CHECK(found == 6 && !closedir(listing));
  for (int i = 0; i < 6; i++) CHECK(!rmdir(all[i]));
  return 0;
}

static int holes(void) {
  struct stat st;
  off_t end = 5LL << 30;
  int fd = make("file", "begin");
  CHECK(pwrite(fd, "end", 3, end) == 3);
  CHECK(!fstat(fd, &st) && st.st_size == end + 3);
  CHECK(pread(fd, buffer, 10, (1LL << 32) - 5) == 10 && !memcmp(buffer, "\0\0\0\0\0\0\0\0\0\0", 10));
  CHECK(pread(fd, buffer, 10, end - 2) == 5 && !memcmp(buffer, "\0\0end", 5));
  CHECK(!ftruncate(fd, 3) && !ftruncate(fd, 6) && pread(fd, buffer, 10, 0) == 6);
  CHECK(!memcmp(buffer, "beg\0\0\0", 6));
  return close(fd);
}

static int blocks_of_holes(void) {
  struct stat st;
  int fd = make("file", "begin");
  CHECK(pwrite(fd, "end", 3, 1 << 30) == 3 && !fsync(fd));
  CHECK(!fstat(fd, &st) && st.st_blocks < 10000);
  return close(fd);
}

static int times(void) {
  struct stat st;
  struct timespec to[2] = {{1000000000, 0}, {4300000000, 0}};
  CHECK(!close(make("file", "x")) && !utimensat(AT_FDCWD, "file", to, 0));
  CHECK(!stat("file", &st) && st.st_atim.tv_sec == to[0].tv_sec && st.st_mtim.tv_sec == to[1].tv_sec);
  return 0;
}

static int times_with_nanoseconds(void) {
  struct stat st;
  struct timespec to[2] = {{1000000000, 1}, {1000000001, 999999999}};
  CHECK(!close(make("file", "x")) && !utimensat(AT_FDCWD, "file", to, 0));
  CHECK(!stat("file", &st) && st.st_atim.tv_nsec == 1 && st.st_mtim.tv_nsec == 999999999);
  return 0;
}

static int rename_flags(void) {
  CHECK(!close(make("one", "1")) && !close(make("two", "2")));
  FAILS(renameat2(AT_FDCWD, "one", AT_FDCWD, "two", RENAME_NOREPLACE), EEXIST);
  CHECK(!renameat2(AT_FDCWD, "one", AT_FDCWD, "two", RENAME_EXCHANGE));
  CHECK(file_holds("one", "2") && file_holds("two", "1"));
  return 0;
}

static int files_without_a_name(void) {
  int fd = open(".", O_TMPFILE | O_RDWR, 0600);
  CHECK(fd >= 0 && write(fd, "x", 1) == 1);
  return close(fd);
}

static int file_system(void) {
  struct statfs fs;
  CHECK(!statfs(".", &fs) && fs.f_blocks > 0 && fs.f_bsize > 0 && fs.f_namelen == 255);
  return 0;
}

static int locks_between_processes(void) {
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 5};
  int fd = make("file", "0123456789abcdef"), ready[2], go[2], status;
  CHECK(fd >= 0 && !pipe(ready) && !pipe(go));
  pid_t child = fork();
  if (!child) {
    int own = open("file", O_RDWR);
    if (fcntl(own, F_SETLK, &lock) || write(ready[1], "x", 1) != 1 || read(go[0], buffer, 1) != 1) _exit(1);
    _exit(0);  // which unlocks
  }
  CHECK(read(ready[0], buffer, 1) == 1);
  FAILS(fcntl(fd, F_SETLK, &lock), EAGAIN);
  struct flock about = lock;
  CHECK(!fcntl(fd, F_GETLK, &about) && about.l_type == F_WRLCK && about.l_start == 10);
  lock.l_start = 0;
  CHECK(!fcntl(fd, F_SETLK, &lock));  // beside it
  CHECK(write(go[1], "x", 1) == 1 && waitpid(child, &status, 0) == child && !status);
  lock.l_start = 10;
  CHECK(!fcntl(fd, F_SETLK, &lock));
  return close(fd);
}

static int attributes(void) {
  CHECK(!close(make("file", "x")) && !mkdir("directory", 0755));
  const char *both[] = {"file", "directory"};
  for (int i = 0; i < 2; i++) {
    const char *name = both[i];
    FAILS(getxattr(name, "user.none", buffer, 10), ENODATA);
    CHECK(!setxattr(name, "user.a", "value", 5, XATTR_CREATE));
    FAILS(setxattr(name, "user.a", "value", 5, XATTR_CREATE), EEXIST);
    CHECK(!setxattr(name, "user.a", "longer value", 12, XATTR_REPLACE));
    FAILS(setxattr(name, "user.b", "value", 5, XATTR_REPLACE), ENODATA);
    CHECK(getxattr(name, "user.a", buffer, sizeof buffer) == 12 && !memcmp(buffer, "longer value", 12));
    FAILS(getxattr(name, "user.a", buffer, 3), ERANGE);
    ssize_t size = listxattr(name, buffer, sizeof buffer);
    CHECK(size >= 7 && memmem(buffer, size, "user.a", 7));
    CHECK(!removexattr(name, "user.a"));
    FAILS(removexattr(name, "user.a"), ENODATA);
  }
  return 0;
}

// Run `work` as USER, in another process.
static int as_user(int (*work)(void)) {
  int status;
  pid_t child = fork();
  if (!child) {
    if (setgroups(0, NULL) || setresgid(USER, USER, USER) || setresuid(USER, USER, USER)) _exit(255);
    int line = work();
    _exit(line > 254 ? line / 2 : line);
  }
  if (waitpid(child, &status, 0) != child) return __LINE__;
  return WEXITSTATUS(status);
}

static int by_user(void) {
  struct stat st;
  FAILS(open("secret", O_RDONLY), EACCES);
  FAILS(open("readable", O_WRONLY), EACCES);
  FAILS(unlink("closed/file"), EACCES);
  FAILS(chmod("readable", 0777), EPERM);
  CHECK(file_holds("readable", "x"));
  CHECK(!close(make("mine", "x")) && !stat("mine", &st) && st.st_uid == USER && st.st_gid == USER);
  int fd = open("run", O_WRONLY);
  CHECK(fd >= 0 && write(fd, "x", 1) == 1 && !close(fd));
  return 0;
}

static int users(void) {
  struct stat st;
  CHECK(!chmod(".", 0777) && !close(make("secret", "x")) && !chmod("secret", 0600));
  CHECK(!close(make("readable", "x")) && !chmod("readable", 0644));
  CHECK(!mkdir("closed", 0755) && !close(make("closed/file", "x")));
  CHECK(!close(make("run", "x")) && !chmod("run", 06777));
  CHECK(as_user(by_user) == 0);
  CHECK(!stat("run", &st) && (st.st_mode & 07777) == 0777);  // a user's write cleared the bits
  CHECK(!stat("mine", &st) && st.st_uid == USER);
  CHECK(!chown("mine", 5, 6) && !stat("mine", &st) && st.st_uid == 5 && st.st_gid == 6);
  return 0;
}

static int shared_mappings(void) {
  int fd = make("file", "contents");
  CHECK(fd >= 0 && !ftruncate(fd, 8192));
  char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(map != MAP_FAILED && !memcmp(map, "contents", 8));
  memcpy(map + 5000, "mapped", 6);
  CHECK(!msync(map, 8192, MS_SYNC));
  CHECK(pread(fd, buffer, 6, 5000) == 6 && !memcmp(buffer, "mapped", 6));
  CHECK(!munmap(map, 8192));
  return close(fd);
}

static const struct {
  const char *name;
  int (*check)(void);
} checks[] = {
#define CASE(name) {#name, name}
    CASE(unlinked_while_open), CASE(renamed_while_open), CASE(replaced_while_open),
    CASE(rename_rules), CASE(directory_renamed_with_files_open), CASE(hard_links), CASE(appending),
    CASE(created_read_only), CASE(modes), CASE(special_files), CASE(symlinks),
    CASE(removed_directory), CASE(removed_while_listed), CASE(listing_can_be_sought), CASE(names),
    CASE(holes), CASE(blocks_of_holes), CASE(times), CASE(times_with_nanoseconds),
    CASE(rename_flags), CASE(files_without_a_name), CASE(file_system),
    CASE(locks_between_processes), CASE(attributes), CASE(users), CASE(shared_mappings),
};

int main(int argc, char **argv) {
  umask(0);
  for (int i = 1; i < argc; i++)
    for (unsigned c = 0; c < sizeof checks / sizeof *checks; c++) {
      char where[4096];
      snprintf(where, sizeof where, "%s/%s", argv[i], checks[c].name);
      errno = 0;
      if (mkdir(where, 0755) || chdir(where)) {
        printf("FAIL %s %s: mkdir: %s\n", argv[i], checks[c].name, strerror(errno));
        continue;
      }
      int line = checks[c].check();
      if (line)
        printf("FAIL %s %s: line %d, %s\n", argv[i], checks[c].name, line, strerror(errno));
      else
        printf("ok %s %s\n", argv[i], checks[c].name);
      fflush(stdout);
    }
  return 0;
}
