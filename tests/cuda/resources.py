"""What every compiled CUDA kernel takes; ``python -m tests.cuda.resources`` writes ``resources.csv`` anew.

Read off the extension itself by cuobjdump (triton brings one): registers, stack, static shared and local
memory, and how many matrix, copy and spilling instructions the machine code has. Dynamic shared memory is
chosen at the launch: dynamic_shared_memory.h has it.
"""

from __future__ import annotations

import collections
import csv
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dynaprune_kernels import _extension

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
TABLE = Path(__file__).parent / "resources.csv"
# Columns of the table by opcode: products of registers and of shared memory (Hopper), asynchronous copies by
# the threads and by the copy engine, loads and stores of local memory.
OPCODES = {
    "hmma": ("HMMA",),
    "hgmma": ("HGMMA",),
    "ldgsts": ("LDGSTS",),
    "utmaldg": ("UTMALDG",),
    "spills": ("LDL", "STL"),
}


class Kernel(NamedTuple):
    """One kernel for one architecture."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    local_bytes: int
    hmma: int
    hgmma: int
    ldgsts: int
    utmaldg: int
    spills: int


@functools.cache
def cuobjdump() -> str | None:
    """A cuobjdump: on the PATH, of a toolkit, or triton's; None without one."""
    spec = importlib.util.find_spec("triton")
    folders = (
        [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "backends/nvidia/bin"]
    )
    places = [
        "cuobjdump",
        "/usr/local/cuda/bin/cuobjdump",
        *(str(folder / "cuobjdump") for folder in folders),
    ]
    return next((path for path in map(shutil.which, places) if path), None)


def printed(*command: str | Path, text: str | None = None) -> str:
    """What a command prints, given ``text``."""
    finished = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return finished.stdout


def sections(listing: str, start: str) -> Iterator[tuple[str, str, str]]:
    """Architecture, mangled name and text of each kernel in a listing of cuobjdump."""
    for image in listing.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = sm_(\w+)", image)
        assert architecture is not None
        parts = re.split(rf"{start}\s*(\w+)", image)[1:]
        yield from ((architecture[1], name, text) for name, text in zip(parts[::2], parts[1::2], strict=True))


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of a compiled library, by name and architecture."""
    tool = cuobjdump()
    assert tool is not None
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    for architecture, name, text in sections(printed(tool, "-sass", library), "Function :"):
        # "/*0010*/  @!P0 HMMA.16816.F32 ...": a predicate may stand before the opcode.
        opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", text, re.MULTILINE)
        counts[architecture, name] = collections.Counter(opcodes)
    usage = list(sections(printed(tool, "--dump-resource-usage", library), "Function"))
    names = printed("c++filt", text="\n".join(name for _, name, _ in usage)).splitlines()
    names = [readable(name) for name in names]
    found = []
    for (architecture, mangled, text), name, dynamic in zip(
        usage, names, dynamic_shared_bytes(names), strict=True
    ):
        taken = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        of = counts[architecture, mangled]
        opcodes = {column: sum(of[opcode] for opcode in group) for column, group in OPCODES.items()}
        memory = taken["STACK"], taken["SHARED"], dynamic, taken["LOCAL"]
        found.append(Kernel(name, architecture, taken["REG"], *memory, **opcodes))
    return sorted(set(found))  # templates that several files use are there more than once


def dynamic_shared_bytes(names: list[str]) -> list[int]:
    """What the kernels of these readable names are launched with, from the constants of csrc/core."""
    lines = "".join(f'  std::printf("%zu\\n", size_t({name}));\n' for name in names)
    source = f"""#include <cstdio>
#include "{Path(__file__).parent / "dynamic_shared_memory.h"}"
namespace launched_with {{
void print() {{
{lines}}}
}}  // namespace launched_with
int main() {{ launched_with::print(); }}
"""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "print"
        flags = ["-std=c++20", "-DDYN_EMULATION", f"-I{Path(__file__).parents[2] / 'csrc'}"]
        printed("g++", "-x", "c++", *flags, "-o", program, "-", text=source)
        return [int(line) for line in printed(program).splitlines()]


def readable(name: str) -> str:
    """A kernel's name with its template arguments, without namespaces, casts, return type and parameters."""
    name = re.sub(r"dynaprune::cuda::|\(anonymous namespace\)::|^void ", "", name)
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name)
    name = name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace("float", "f32")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def compiler() -> str:
    """The nvcc that the extension was built with."""
    return str(_extension.build_facts().get("cuda", {}).get("compiler"))


def rows(found: list[Kernel]) -> list[dict[str, str]]:
    """The table's rows."""
    return [{column: str(value) for column, value in kernel._asdict().items()} for kernel in found]


def read_table() -> tuple[str, list[dict[str, str]]]:
    """The compiler when the table was written, and its rows."""
    first, *rest = TABLE.read_text().splitlines()
    return first.removeprefix("# "), list(csv.DictReader(rest))


def main() -> int:
    """Write the table."""
    library = _extension.find("_C_cuda")
    if library is None or cuobjdump() is None:
        print(_extension.load_cuda().reason or "no cuobjdump", file=sys.stderr)
        return 2
    found = rows(kernels(library))
    temporary = TABLE.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        file.write(f"# {compiler()}\n")
        writer = csv.DictWriter(file, Kernel._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    temporary.replace(TABLE)
    print(f"{len(found)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
