"""Every guest-physical address and interrupt line, in one map. Imports nothing.

    0x0000_0000  +--------------------------------+
                 | real-mode vectors, unused      |
    0x0000_0500  | GDT                            |  GDT_GPA
    0x0000_7000  | boot_params ("zero page")      |  BOOT_PARAMS_GPA
    0x0000_9000  | page tables for the entry      |  PAGE_TABLES_GPA    6 pages
    0x0002_0000  | kernel command line            |  CMDLINE_GPA        up to 64 KiB
    0x0009_FC00  | (end of conventional memory)   |  LOW_RAM_END
    0x000E_0000  | ACPI: RSDP, then the tables    |  ACPI_GPA           128 KiB
    0x0010_0000  | RAM: kernel at its own address |  HIGH_RAM_GPA
                 | ...                            |
                 | initramfs, at the top of RAM   |
    0xC000_0000  +--------------------------------+  MMIO_HOLE_GPA      3 GiB
    0xD000_0000  | virtio-mmio, one page a device |  VIRTIO_MMIO_GPA
    0xD800_0000  | devices of the user's own      |  DEVICE_MMIO_GPA    to DEVICE_MMIO_END
    0xE000_0000  | PCI configuration space (ECAM) |  PCI_ECAM_GPA       1 MiB: bus 0
    0xE100_0000  | PCI BARs, 64 KiB a slot        |  PCI_WINDOW_GPA     to PCI_WINDOW_END
    0xFEC0_0000  | IOAPIC (in KVM)                |  IOAPIC_GPA
    0xFEE0_0000  | local APICs (in KVM)           |  LOCAL_APIC_GPA
    0xFFFB_C000  | KVM's identity map and TSS     |  IDENTITY_MAP_GPA, TSS_GPA (VMX only)
    0x1_0000_0000+--------------------------------+  RAM_ABOVE_4G_GPA   4 GiB
                 | the rest of RAM                |
                 +--------------------------------+

Below 1 MiB it looks as Linux expects of a PC (Documentation/x86/boot.rst);
everything a modern guest needs is told to it by boot_params and ACPI.
"""

PAGE_SIZE = 0x1000

# --- memory ---------------------------------------------------------------------------------
GDT_GPA = 0x500
BOOT_PARAMS_GPA = 0x7000
PAGE_TABLES_GPA = 0x9000
CMDLINE_GPA = 0x2_0000
CMDLINE_MAX = 0x1_0000
LOW_RAM_END = 0x9_FC00
ACPI_GPA = 0xE_0000
ACPI_END = 0x10_0000
HIGH_RAM_GPA = 0x10_0000

MMIO_HOLE_GPA = 0xC000_0000
VIRTIO_MMIO_GPA = 0xD000_0000
VIRTIO_MMIO_STRIDE = 0x1000
DEVICE_MMIO_GPA = 0xD800_0000
DEVICE_MMIO_END = 0xE000_0000
PCI_ECAM_GPA = 0xE000_0000
PCI_ECAM_LEN = 0x10_0000
PCI_WINDOW_GPA = 0xE100_0000
PCI_WINDOW_END = 0xF000_0000
PCI_SLOT_STRIDE = 0x1_0000
IOAPIC_GPA = 0xFEC0_0000
LOCAL_APIC_GPA = 0xFEE0_0000
IDENTITY_MAP_GPA = 0xFFFB_C000
TSS_GPA = 0xFFFB_D000
RAM_ABOVE_4G_GPA = 0x1_0000_0000

# --- ports ----------------------------------------------------------------------------------
I8042_PORT = 0x60  # data 0x60, status and command 0x64
RTC_PORT = 0x70  # index 0x70, data 0x71
DEBUG_EXIT_PORT = 0xF4
FW_CFG_PORT = 0x510  # selector 0x510, data 0x511
RESET_CONTROL_PORT = 0xCF9  # a single byte; wider accesses at 0xCF8 are PCI's
PCI_CONFIG_PORT = 0xCF8  # address 0xCF8, data 0xCFC
COM1_PORT = 0x3F8
POWER_PORT = 0x600  # ACPI sleep control, sleep status, reset, event status
# (first, count) of those that KVM answers itself: PIC, PIT, PIT, speaker gate, PIC, ELCR.
IN_KERNEL_PORTS = ((0x20, 2), (0x40, 4), (0x61, 1), (0xA0, 2), (0x4D0, 2))

# --- interrupt lines (GSIs; the in-kernel IOAPIC has 24) ------------------------------------
COM1_GSI = 4
POWER_GSI = 9
VIRTIO_GSI = 10  # the first of the virtio devices; a user's own devices have the last ones
GSI_COUNT = 24
VIRTIO_MAX = GSI_COUNT - VIRTIO_GSI
