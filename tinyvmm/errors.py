"""The three kinds of failure, never mixed.

A user's mistake or a missing facility is a `ConfigError`: one line that names what and why, with
the remedy. A refused system call on KVM is a `KvmError`, which names the ioctl. What a guest does
wrong never raises past its device; when it leaves a vCPU unable to run at all, that is a
`VcpuError` with the state it died in. To who uses a machine from Python, its end under a command is
a `MachineError`. Anything else that escapes is a bug of ours and crashes.
"""

import errno as errno_names
import os


class TinyvmmError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(TinyvmmError):
    """What was asked for cannot be done; the text says why and what to do, in one line."""


class KvmError(TinyvmmError, OSError):
    """An ioctl on /dev/kvm or one of its descriptors failed.

    `what` is the ioctl's name as in <linux/kvm.h>; `errno` is the kernel's answer.
    """

    def __init__(self, what: str, number: int) -> None:
        """Name the ioctl `what` and the errno `number`."""
        name = errno_names.errorcode.get(number, str(number))
        super().__init__(number, f"{what}: {os.strerror(number)} ({name})")
        self.what = what

    def __str__(self) -> str:
        return str(self.strerror)


class MachineError(TinyvmmError):
    """A machine ended, or never came up, while something was wanted of it; the text says why."""


class VcpuError(TinyvmmError):
    """A vCPU cannot go on; the text holds exit reason, registers and code bytes."""
