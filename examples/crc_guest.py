"""Runs in the guest, as root: drives examples/crc_device.py from a program, through /dev/mem.

A kernel's driver would ask ACPI for the device's resources. A program finds them in /proc/iomem,
under the name of the ACPI device, and maps the page. Linux lets it (STRICT_DEVMEM forbids RAM, and
registers that a driver has claimed; nobody has claimed these).
"""

import mmap
import os
import re
import zlib

HID = "CRCD0001"
ID, DATA, CRC, RESET, COUNT = range(5)  # 32-bit words

with open("/proc/iomem") as file:
    found = re.search(rf"([0-9a-f]+)-([0-9a-f]+) : {HID}:", file.read())
if found is None:
    raise SystemExit(f"there is no {HID} here: run this in a guest that has the device")
gpa = int(found[1], 16)

fd = os.open("/dev/mem", os.O_RDWR | os.O_SYNC)
page = mmap.mmap(fd, mmap.PAGESIZE, offset=gpa)
registers = memoryview(page).cast("I")  # so that every access is one of 32 bits

text = b"one page of registers, sixteen and more words long, of which we use five"
registers[RESET] = 0
for word in memoryview(text).cast("I"):
    registers[DATA] = word
print(f"gpa={gpa:#x}")
print(f"id={registers[ID].to_bytes(4, 'little').decode()}")
print(f"count={registers[COUNT]}")
print(f"crc={'right' if registers[CRC] == zlib.crc32(text) else hex(registers[CRC])}")
