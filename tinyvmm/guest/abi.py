"""The part of Linux's interface to programs that PID 1 uses, by the kernel's own names.

System call numbers are those of <asm/unistd_64.h>; the rest is from the headers named beside it.
The tests compile a C program against those headers and compare every one.
"""

# <asm/unistd_64.h>
SYS_READ = 0
SYS_WRITE = 1
SYS_OPEN = 2
SYS_CLOSE = 3
SYS_POLL = 7
SYS_RT_SIGPROCMASK = 14
SYS_IOCTL = 16
SYS_DUP2 = 33
SYS_NANOSLEEP = 35
SYS_SOCKET = 41
SYS_VFORK = 58
SYS_EXECVE = 59
SYS_EXIT = 60
SYS_WAIT4 = 61
SYS_KILL = 62
SYS_FCNTL = 72
SYS_CHDIR = 80
SYS_MKDIR = 83
SYS_SYMLINK = 88
SYS_UMASK = 95
SYS_SETSID = 112
SYS_CHROOT = 161
SYS_SYNC = 162
SYS_MOUNT = 165
SYS_REBOOT = 169
SYS_SETHOSTNAME = 170
SYS_SIGNALFD4 = 289
SYS_PIPE2 = 293
SYS_PRLIMIT64 = 302
SYS_FINIT_MODULE = 313

# <asm-generic/fcntl.h>, <bits/fcntl.h>
O_RDONLY = 0
O_WRONLY = 0o1
O_RDWR = 0o2
O_CREAT = 0o100
O_NOCTTY = 0o400
O_TRUNC = 0o1000
O_NONBLOCK = 0o4000
O_CLOEXEC = 0o2000000
F_SETFL = 4

# <linux/mount.h>
MS_RDONLY = 1 << 0
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_BIND = 1 << 12
MS_MOVE = 1 << 13

# <poll.h>, <signal.h>, <sys/signalfd.h>, <sys/wait.h>, <sys/resource.h>
POLLIN = 1 << 0
POLLOUT = 1 << 2
POLLERR = 1 << 3
POLLHUP = 1 << 4
POLLNVAL = 1 << 5
SIGKILL = 9
SIGCHLD = 17
SIG_SETMASK = 2
SFD_NONBLOCK = O_NONBLOCK
SFD_CLOEXEC = O_CLOEXEC
WNOHANG = 1
RLIMIT_NOFILE = 7

# <asm/ioctls.h>
TIOCSCTTY = 0x540E
TIOCGPGRP = 0x540F
TIOCSWINSZ = 0x5414
TIOCSPTLCK = 0x4004_5431
TIOCGPTPEER = 0x5441

# <sys/socket.h>, <linux/sockios.h>, <linux/if.h>
AF_INET = 2
SOCK_DGRAM = 2
SOCK_CLOEXEC = O_CLOEXEC
SIOCADDRT = 0x890B
SIOCSIFFLAGS = 0x8914
SIOCSIFADDR = 0x8916
SIOCSIFNETMASK = 0x891C
IFF_UP = 1 << 0
IFF_RUNNING = 1 << 6
IFNAMSIZ = 16
RTF_UP = 1 << 0
RTF_GATEWAY = 1 << 1
SIZEOF_IFREQ = 40

# <linux/reboot.h>
LINUX_REBOOT_MAGIC1 = 0xFEE1DEAD
LINUX_REBOOT_MAGIC2 = 0x28121969
LINUX_REBOOT_CMD_POWER_OFF = 0x4321FEDC
