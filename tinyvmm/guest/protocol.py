"""What PID 1 and the host tell each other, in numbers.

Ports 1 to 3 carry the command's stdin, stdout and stderr and nothing else. Port 4, control, carries
records both ways, each a `RECORD`: two little-endian 32-bit numbers, kind and value.

    STARTED       the command runs; its process id
    EXITED        it has ended, and all it wrote is on its way; its status, as from wait4(2)
    EXEC_FAILED   there is no command to run; errno of execve(2)
    SETUP_FAILED  the guest could not be made ready; step index << 16 | errno
    SIGNAL        a signal for the command's process group, or the terminal's foreground one
    WINSIZE       the terminal's size; rows | columns << 16
    GOODBYE       the host has everything and the guest may power off; 0
    EXECUTE       a program of so many bytes follows, which PID 1 is to start
    EXECUTED      it runs; its process id, or -errno
    ENDED         one of those has ended; its process id
    ENDED_STATUS  follows ENDED; its status, as from wait4(2)

One of STARTED, EXEC_FAILED and SETUP_FAILED comes first; after the last two, as after EXITED, the
guest powers off. EXECUTED answers each EXECUTE, in order; guest/execution.py says what is started.
"""

from struct import Struct

RECORD = Struct("<II")
RECORD_LEN = RECORD.size

# guest to host
STARTED = 1
EXITED = 2
EXEC_FAILED = 3
SETUP_FAILED = 4
EXECUTED = 5
ENDED = 6
ENDED_STATUS = 7
# host to guest
SIGNAL = 16
WINSIZE = 17
GOODBYE = 18
EXECUTE = 19

STREAMS = ("control", "stdin", "stdout", "stderr")
"""What a program of `exec` connects to the host, in this order."""
