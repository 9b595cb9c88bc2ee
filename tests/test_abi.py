"""Layouts: Python and C mean the same bytes.

Invariants: the committed kernels/abi.h is what abi generates; a C++ compiler finds every member where Python does; the slots that ring.py
packs are the Task and Completion of the table; commit words are the same on both sides.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from concordia import abi
from concordia.device.compiler import FLAGS, KERNELS
from concordia.device.driver import ExecutorPlan
from concordia.runtime import ring


def compiled(folder: Path, body: str, include: str = "abi.h") -> str:
    """What a program of this body prints."""
    program = folder / "program.cpp"
    program.write_text(
        f'#include "{include}"\n#include <stdio.h>\n#include <stddef.h>\nint main() {{\n{body}\n}}\n'
    )
    binary = folder / "program"
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fvisibility=hidden", "-O3")]
    command = [
        "g++",
        *flags,
        "-Werror",
        "-Wno-unused-function",
        f"-I{KERNELS}",
        str(program),
        "-o",
        str(binary),
    ]
    subprocess.run([*command, "-pthread"], check=True, timeout=120)
    return subprocess.run(
        [str(binary)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_header_is_the_generated_one_when_committed() -> None:
    assert (KERNELS / "abi.h").read_text() == abi.header(), "regenerate: python -m concordia.abi"


def test_offsets_are_the_same_when_a_compiler_is_asked(tmp_path: Path) -> None:
    lines, expected = [], []
    for struct in abi.STRUCTS:
        lines.append(f'printf("{struct.name} %zu\\n", sizeof({struct.name}));')
        expected.append(f"{struct.name} {struct.size}")
        for name, offset in struct.offsets().items():
            lines.append(f'printf("{struct.name}.{name} %zu\\n", offsetof({struct.name}, {name}));')
            expected.append(f"{struct.name}.{name} {offset}")
    assert compiled(tmp_path, "\n".join(lines)).split("\n")[:-1] == expected


def test_constants_are_the_same_when_a_compiler_is_asked(tmp_path: Path) -> None:
    names = abi.constants()
    camel = {name: "k" + "".join(part.capitalize() for part in name.split("_")) for name in names}
    body = "\n".join(f'printf("%llu\\n", (unsigned long long){camel[name]});' for name in names)
    assert compiled(tmp_path, body).split() == [str(value) for value in names.values()]


@pytest.mark.parametrize("struct", abi.STRUCTS, ids=lambda struct: struct.name)
def test_numpy_sees_the_same_bytes_when_it_reads_a_structure(struct: abi.Struct) -> None:
    dtype = struct.dtype
    assert dtype.itemsize == struct.size
    assert dtype.fields is not None
    assert {name: dtype.fields[name][1] for name in dtype.names or ()} == struct.offsets()


def test_slot_is_a_task_when_ring_packs_it() -> None:
    values = list(range(1, 21))
    packed = np.frombuffer(ring._TASK.pack(*values), abi.TASK.dtype)[0]
    names = ["publish", "opcode", "kind", "region", "record_kind", "key", "incarnation", "token_start", "token_end", "blocks",
             "block_count", "flags", "source", "source_bytes", "step", "stamp_ns", "arg", "span", "model_hash"]  # fmt: skip
    found = [int(word) for name in names for word in np.atleast_1d(packed[name])]
    assert found == values
    answer = np.zeros(1, abi.COMPLETION.dtype)
    answer["status"], answer["generation"], answer["sequence"], answer["result"] = 2, 3, 4, 7
    answer["payload_hash"] = [5, 6]
    assert ring._COMPLETION.unpack(answer.tobytes()) == (0, 2, 3, 4, 5, 6, 7)


def test_plan_is_the_compiled_one_when_packed(tmp_path: Path) -> None:
    names = ExecutorPlan.__dataclass_fields__
    body = (
        "\n".join(f'printf("%zu\\n", offsetof(ExecutorPlan, {name}));' for name in names)
        + '\nprintf("%zu\\n", sizeof(ExecutorPlan));'
    )
    printed = [int(word) for word in compiled(tmp_path, body, include="host.cpp").split()]
    assert printed == [8 * index for index in range(len(names) + 1)]
    assert len(ExecutorPlan(*range(len(names))).pack()) == 8 * len(names)


def test_commit_word_depends_on_salt_and_sequence() -> None:
    words = {abi.commit_word(salt, sequence) for salt in range(1, 50) for sequence in range(50)}
    assert len(words) == 49 * 50
    assert all(0 <= word < 1 << 64 for word in words)
