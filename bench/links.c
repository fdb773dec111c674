// What bench/links.py measures, as PID 1 of a guest; and, told to serve, the host's end of it.
//
//   on the kernel's command line: -- WHAT,WHAT.. COUNT MIB MODULE...
//       WHAT is tap, passt (interfaces, told apart by the last byte of their address), vsock or
//       console (port 1 of the first console device). Prints "end WHAT COUNT NANOSECONDS" lines on
//       the console, and powers off.
//   serve GUESTS TURNS, and as often as wanted: tcp PORT | unix PATH | vsock PORT
//
// On every kind of stream the guest says what it wants: 'P', and each byte is sent back, until a
// 'q'; 'S' and a length, and that many bytes are taken, then answered by one; 'R' and a length, and
// that many bytes come; 'T', and it may go on when it is its turn, which ends with its next 'T':
// GUESTS of them have TURNS each, one after the other, and are told 'g', or 'e' for no more.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 1 << 16, PORT = 5000, SHORT_PART = 10 };

static int init;  // whether this is PID 1
static char buffer[CHUNK];

static void need(int ok, const char *what) {
  if (ok) return;
  printf("failed %s: %s\n", what, strerror(errno));
  fflush(stdout);
  if (!init) exit(1);
  reboot(RB_POWER_OFF);
}

static int read_all(int fd, char *to, long length) {
  for (long done = 0; done < length;) {
    long count = read(fd, to + done, length - done);
    if (count <= 0) return 0;
    done += count;
  }
  return 1;
}

static int write_all(int fd, const char *from, long length) {
  for (long done = 0; done < length;) {
    long count = write(fd, from + done, length - done);
    if (count <= 0) return 0;
    done += count;
  }
  return 1;
}

static int put(int fd, const char *from, long length) {
  for (; length > 0; length -= CHUNK)
    if (!write_all(fd, from, length < CHUNK ? length : CHUNK)) return 0;
  return 1;
}

static int take(int fd, char *to, long length) {
  for (; length > 0; length -= CHUNK)
    if (!read_all(fd, to, length < CHUNK ? length : CHUNK)) return 0;
  return 1;
}

// --- the host's end ---

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // guards the next line
static int guests = 1, arrived, left = 1, turn;           // turns left, and whose the next one is
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

// Wait for the turn of guest `number`, or of a new one for -1, whose turn it was or who is gone.
static char next_turn(int *number, int gone) {
  pthread_mutex_lock(&lock);
  if (*number < 0) *number = arrived++;
  else if (left > 0) left--, turn = (turn + 1) % guests;
  if (gone) left = 0;
  pthread_cond_broadcast(&changed);
  while (left > 0 && (arrived < guests || turn != *number)) pthread_cond_wait(&changed, &lock);
  char word = left > 0 ? 'g' : 'e';
  pthread_mutex_unlock(&lock);
  return word;
}

static void *answer(void *argument) {
  int fd = (long)argument, number = -1;
  char *own = calloc(1, CHUNK), word;
  long length;
  while (read_all(fd, &word, 1)) {
    if (word == 'P') {
      while (read_all(fd, &word, 1) && write_all(fd, &word, 1) && word != 'q');
    } else if (word == 'T') {
      word = next_turn(&number, 0);
      if (!write_all(fd, &word, 1)) break;
    } else {
      if (!read_all(fd, (char *)&length, sizeof length)) break;
      if (!(word == 'S' ? take(fd, own, length) && write_all(fd, "", 1) : put(fd, own, length)))
        break;
    }
  }
  if (number >= 0) next_turn(&number, 1);
  close(fd);
  free(own);
  return NULL;
}

static int listen_at(const char *kind, const char *where) {
  union {
    struct sockaddr_in in;
    struct sockaddr_un un;
    struct sockaddr_vm vm;
  } at;
  memset(&at, 0, sizeof at);
  int family = !strcmp(kind, "tcp") ? AF_INET : !strcmp(kind, "unix") ? AF_UNIX : AF_VSOCK;
  socklen_t length = sizeof at.in;
  if (family == AF_INET) {
    at.in = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(where))};
  } else if (family == AF_UNIX) {
    at.un.sun_family = AF_UNIX;
    strncpy(at.un.sun_path, where, sizeof at.un.sun_path - 1);
    length = sizeof at.un;
  } else {
    at.vm.svm_family = AF_VSOCK, at.vm.svm_cid = VMADDR_CID_ANY, at.vm.svm_port = atoi(where);
    length = sizeof at.vm;
  }
  int listener = socket(family, SOCK_STREAM, 0);
  need(listener >= 0 && !bind(listener, (void *)&at, length) && !listen(listener, 100), where);
  return listener;
}

static void *serve(void *listener) {
  for (;;) {
    int fd = accept((long)listener, NULL, NULL), one = 1;
    if (fd < 0) continue;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);  // of no other kind
    pthread_t thread;
    need(!pthread_create(&thread, NULL, answer, (void *)(long)fd), "thread");
    pthread_detach(thread);
  }
  return NULL;
}

// --- the guest ---

static long now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * 1000000000L + at.tv_nsec;
}

static void end(const char *link, const char *what, long often, long ns) {
  printf("end %s_%s %ld %ld\n", link, what, often, ns);
}

static void round_trips(const char *link, int fd, int count) {
  char byte = 'P';
  need(write_all(fd, &byte, 1), "P");
  byte = 'x';
  long begun = 0;
  for (int i = -count / 10; i < count; i++) {  // a few to be warm
    if (!i) begun = now();
    need(write_all(fd, &byte, 1) && read_all(fd, &byte, 1), "round trip");
  }
  end(link, "round_trip", count, now() - begun);
  byte = 'q';
  need(write_all(fd, &byte, 1) && read_all(fd, &byte, 1), "q");
}

static void bulk(const char *link, int fd, char word, long mib) {
  long length = mib << 20, begun = now();
  need(write_all(fd, &word, 1) && write_all(fd, (char *)&length, sizeof length), "command");
  need(word == 'S' ? put(fd, buffer, length) && read_all(fd, buffer, 1)
                   : take(fd, buffer, length), "bulk");
  end(link, word == 'S' ? "send_MiB" : "receive_MiB", mib, now() - begun);
}

static int connect_vsock(void) {
  struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = PORT};
  int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
  need(fd >= 0 && !connect(fd, (void *)&at, sizeof at), "vsock");
  return fd;
}

static int connect_tcp(const char *host) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(PORT)};
  int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  inet_aton(host, &at.sin_addr);
  need(fd >= 0 && !connect(fd, (void *)&at, sizeof at), host);
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

// Give the interface whose address ends in `number` an IPv4 address.
static void configure(int number, const char *address) {
  int fd = socket(AF_INET, SOCK_DGRAM, 0);
  for (int i = 0; i < 8; i++) {
    struct ifreq request = {0};
    struct sockaddr_in *at = (void *)&request.ifr_addr;
    snprintf(request.ifr_name, IFNAMSIZ, "eth%d", i);
    if (ioctl(fd, SIOCGIFHWADDR, &request) || request.ifr_hwaddr.sa_data[5] != number) continue;
    memset(at, 0, sizeof *at);
    at->sin_family = AF_INET;
    inet_aton(address, &at->sin_addr);
    need(!ioctl(fd, SIOCSIFADDR, &request), address);
    inet_aton("255.255.255.0", &at->sin_addr);
    need(!ioctl(fd, SIOCSIFNETMASK, &request), "netmask");
    request.ifr_flags = IFF_UP;
    need(!ioctl(fd, SIOCSIFFLAGS, &request), "up");
    close(fd);
    return;
  }
  errno = ENODEV;
  need(0, address);
}

static double number_after(const char *text, const char *name) {
  const char *found = text ? strstr(text, name) : NULL;
  return found ? strtod(found + strlen(name), NULL) : 0;
}

// iperf3's own figures: what the receiver got, in what time.
static void iperf(const char *link, const char *host, int reverse, long mib) {
  static char said[1 << 16];
  char amount[32];
  int ends[2];
  long length = 0, count;
  snprintf(amount, sizeof amount, "%ldM", mib);
  need(!pipe(ends), "pipe");
  if (!fork()) {
    dup2(ends[1], 1);
    execl("/usr/bin/iperf3", "iperf3", "-J", "-c", host, "-n", amount, reverse ? "-R" : NULL, NULL);
    _exit(127);
  }
  close(ends[1]);
  while ((count = read(ends[0], said + length, sizeof said - 1 - length)) > 0) length += count;
  said[length] = 0;
  close(ends[0]);
  wait(NULL);
  const char *sum = strstr(said, "\"sum_received\"");
  double seconds = number_after(sum, "\"seconds\":"), bytes = number_after(sum, "\"bytes\":");
  if (!bytes) printf("%.300s\n", said);
  need(bytes > 0, "iperf3");
  end(link, reverse ? "receive_MiB" : "send_MiB", bytes / (1 << 20), seconds * 1e9);
}

static void network(const char *link, int number, const char *own, const char *host, int count,
                    long mib) {
  configure(number, own);
  int fd = connect_tcp(host);
  round_trips(link, fd, count);
  close(fd);
  iperf(link, host, 0, mib);
  iperf(link, host, 1, mib);
}

static void vsock_turn(int count, long mib) {
  int fd = connect_vsock();
  round_trips("vsock", fd, count);
  bulk("vsock", fd, 'S', mib);
  bulk("vsock", fd, 'R', mib);
  close(fd);
  long begun = now();
  for (int i = 0; i < count / SHORT_PART; i++) {
    char word = 'P';
    fd = connect_vsock();
    need(write_all(fd, &word, 1) && write_all(fd, &word, 1) && read_all(fd, &word, 1), "short");
    close(fd);
  }
  end("vsock", "connection", count / SHORT_PART, now() - begun);
}

// Wait for the next turn; whether there is one.
static int my_turn(int fd) {
  char word = 'T';
  need(write_all(fd, &word, 1) && read_all(fd, &word, 1), "turn");
  return word == 'g';
}

static void vsock(int count, long mib) {
  int fd = connect_vsock();
  printf("up\n");
  while (my_turn(fd)) vsock_turn(count, mib);
}

static void console(int count, long mib) {
  int fd = -1;
  for (int i = 0; fd < 0 && i < 1000; i++) {
    fd = open("/dev/vport0p1", O_RDWR);
    if (fd < 0) fd = open("/dev/vport1p1", O_RDWR);
    if (fd < 0) usleep(10000);
  }
  need(fd >= 0, "console port");
  printf("up\n");
  while (my_turn(fd)) {
    round_trips("console", fd, count);
    bulk("console", fd, 'S', mib);
    bulk("console", fd, 'R', mib);
  }
}

int main(int argc, char **argv) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (argc < 4) return 1;
  if (!strcmp(argv[1], "serve")) {
    signal(SIGPIPE, SIG_IGN);
    guests = atoi(argv[2]), left = guests * atoi(argv[3]);
    pthread_t thread;
    for (int i = 4; i + 1 < argc; i += 2)
      need(!pthread_create(&thread, NULL, serve, (void *)(long)listen_at(argv[i], argv[i + 1])),
           "thread");
    printf("serving\n");
    return pthread_join(thread, NULL);
  }
  init = 1;
  int count = atoi(argv[2]), mib = atoi(argv[3]);
  for (int i = 4; i < argc; i++) {
    int fd = open(argv[i], O_RDONLY);
    need(fd >= 0 && !syscall(SYS_finit_module, fd, "", 0), argv[i]);
    close(fd);
  }
  mkdir("/dev", 0755);
  mkdir("/tmp", 0777);
  need(!mount("dev", "/dev", "devtmpfs", 0, NULL) || errno == EBUSY, "devtmpfs");
  signal(SIGPIPE, SIG_IGN);
  for (char *what = strtok(argv[1], ","); what; what = strtok(NULL, ",")) {
    if (!strcmp(what, "tap")) network(what, 1, "192.0.2.2", "192.0.2.1", count, mib);
    if (!strcmp(what, "passt")) network(what, 2, "10.0.2.15", "10.0.2.2", count, mib);
    if (!strcmp(what, "vsock")) vsock(count, mib);
    if (!strcmp(what, "console")) console(count, mib);
  }
  printf("done\n");
  reboot(RB_POWER_OFF);
  return 0;
}
