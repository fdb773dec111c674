"""`struct boot_params`, the page of facts a boot loader hands to Linux.

Follows arch/x86/include/uapi/asm/bootparam.h, Documentation/arch/x86/zero-page.rst and boot.rst.
Offsets below are those of `struct boot_params`; `struct setup_header` sits in it at 0x1F1, which is
also its offset in a bzImage file, so one table reads both: the header is copied from the file into
an otherwise zero page, and the boot loader fills in the rest.
"""

from struct import calcsize, pack_into, unpack_from

from tinyvmm.layout import PAGE_SIZE

SETUP_HEADER = 0x1F1
SETUP_HEADER_END_MAX = 0x290  # edd_mbr_sig_buffer follows
E820_TABLE = 0x2D0
E820_MAX_ENTRIES_ZEROPAGE = 128

FIELDS = {
    # name: (offset, struct format)
    "acpi_rsdp_addr": (0x070, "<Q"),
    "ext_ramdisk_image": (0x0C0, "<I"),
    "ext_ramdisk_size": (0x0C4, "<I"),
    "ext_cmd_line_ptr": (0x0C8, "<I"),
    "e820_entries": (0x1E8, "<B"),
    "sentinel": (0x1EF, "<B"),
    # struct setup_header
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "boot_flag": (0x1FE, "<H"),
    "jump": (0x200, "<H"),
    "header": (0x202, "<I"),
    "version": (0x206, "<H"),
    "kernel_version": (0x20E, "<H"),
    "type_of_loader": (0x210, "<B"),
    "loadflags": (0x211, "<B"),
    "code32_start": (0x214, "<I"),
    "ramdisk_image": (0x218, "<I"),
    "ramdisk_size": (0x21C, "<I"),
    "heap_end_ptr": (0x224, "<H"),
    "ext_loader_type": (0x227, "<B"),
    "cmd_line_ptr": (0x228, "<I"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "payload_offset": (0x248, "<I"),
    "payload_length": (0x24C, "<I"),
    "setup_data": (0x250, "<Q"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
    "handover_offset": (0x264, "<I"),
    "kernel_info_offset": (0x268, "<I"),
}

BOOT_FLAG = 0xAA55
HDRS_MAGIC = 0x5372_6448  # "HdrS"
LOADED_HIGH = 1 << 0
KEEP_SEGMENTS = 1 << 6
CAN_USE_HEAP = 1 << 7
XLF_KERNEL_64 = 1 << 0
TYPE_OF_LOADER_UNDEFINED = 0xFF

E820_RAM = 1
E820_RESERVED = 2
E820_ACPI = 3


class BootParams:
    """One page of `struct boot_params`, fields by the names of bootparam.h: `params["version"]`.

    Values are unsigned integers; storing one that does not fit raises struct.error.
    """

    __slots__ = ("page",)

    def __init__(self, setup_header: bytes = b"") -> None:
        """Start from zeros and a kernel file's `setup_header`, as boot.rst asks."""
        self.page = bytearray(PAGE_SIZE)
        self.page[SETUP_HEADER : SETUP_HEADER + len(setup_header)] = setup_header

    def __getitem__(self, name: str) -> int:
        offset, form = FIELDS[name]
        return int(unpack_from(form, self.page, offset)[0])

    def __setitem__(self, name: str, value: int) -> None:
        offset, form = FIELDS[name]
        pack_into(form, self.page, offset, value)

    @property
    def setup_header(self) -> bytes:
        """The bytes of `struct setup_header`, up to the length its own jump instruction tells."""
        end = 0x202 + self.page[0x201]
        return bytes(self.page[SETUP_HEADER : min(end, SETUP_HEADER_END_MAX)])

    def add_e820(self, gpa: int, size: int, kind: int) -> None:
        """Append one `struct boot_e820_entry`; `kind` is one of the E820_* numbers."""
        entries = self["e820_entries"]
        if entries == E820_MAX_ENTRIES_ZEROPAGE:
            raise ValueError("the e820 table of boot_params is full")
        pack_into("<QQI", self.page, E820_TABLE + calcsize("<QQI") * entries, gpa, size, kind)
        self["e820_entries"] = entries + 1
