"""`struct boot_params` against the kernel's own header."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.kernel_files import bootparam
from tinyvmm.kernel_files.bootparam import FIELDS, BootParams

BOOTPARAM_H = Path("/usr/include/x86_64-linux-gnu/asm/bootparam.h")
OUTSIDE_SETUP_HEADER = {n for n, (offset, _) in FIELDS.items() if offset < bootparam.SETUP_HEADER}


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
@pytest.mark.skipif(not BOOTPARAM_H.exists(), reason="needs the kernel's userspace headers")
def test_every_offset_size_and_constant_is_that_of_asm_bootparam_h(tmp_path: Path) -> None:
    constants = ["LOADED_HIGH", "KEEP_SEGMENTS", "CAN_USE_HEAP", "XLF_KERNEL_64"]
    constants += ["E820_MAX_ENTRIES_ZEROPAGE"]
    lines = [f'printf("{c} %lu\\n", (unsigned long){c});' for c in constants]
    for name in FIELDS:
        member = name if name in OUTSIDE_SETUP_HEADER else f"hdr.{name}"
        lines.append(
            f'printf("{name} %zu %zu\\n", offsetof(struct boot_params, {member}),'
            f"sizeof(((struct boot_params *)0)->{member}));"
        )
    lines += [
        'printf("SETUP_HEADER %zu\\n", offsetof(struct boot_params, hdr));',
        'printf("SETUP_HEADER_END_MAX %zu\\n", offsetof(struct boot_params, edd_mbr_sig_buffer));',
        'printf("E820_TABLE %zu\\n", offsetof(struct boot_params, e820_table));',
        'printf("PAGE_SIZE %zu\\n", sizeof(struct boot_params));',
    ]
    source = tmp_path / "offsets.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <asm/bootparam.h>\n"
        "int main(void) {" + "\n".join(lines) + "return 0; }"
    )
    subprocess.run(["gcc", "-o", tmp_path / "offsets", source], check=True)
    output = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True)
    for line in output.stdout.splitlines():
        name, *values = line.split()
        if name in FIELDS:
            offset, form = FIELDS[name]
            assert [offset, struct.calcsize(form)] == [int(v) for v in values], name
        else:
            assert getattr(bootparam, name) == int(values[0]), name


@given(st.sampled_from(sorted(FIELDS)), st.integers(0, (1 << 64) - 1))
def test_a_field_reads_back_as_written_and_leaves_the_others_alone(name: str, value: int) -> None:
    value &= (1 << 8 * struct.calcsize(FIELDS[name][1])) - 1
    params = BootParams()
    params[name] = value
    assert params[name] == value
    assert all(params[other] == 0 for other in FIELDS if other != name)


def test_a_value_too_large_for_its_field_is_refused_not_truncated() -> None:
    params = BootParams()
    with pytest.raises(struct.error):
        params["ramdisk_image"] = 1 << 32


def test_the_setup_header_ends_where_its_jump_instruction_says() -> None:
    params = BootParams(bytes(range(1, 0x80)))
    params["jump"] = 0x10EB
    assert params.setup_header == bytes(params.page[0x1F1 : 0x202 + 0x10])


def test_the_e820_table_holds_128_entries_and_no_more() -> None:
    params = BootParams()
    for index in range(128):
        params.add_e820(index << 12, 4096, bootparam.E820_RAM)
    entry = struct.unpack_from("<QQI", params.page, 0x2D0 + 127 * 20)
    assert (params["e820_entries"], entry) == (128, (127 << 12, 4096, 1))
    with pytest.raises(ValueError, match="full"):
        params.add_e820(0, 1, 1)
