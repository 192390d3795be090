"""Corrupted indices and malformed calls of the raw CPU ops: `python -m tests.fuzz.kernels`.

Every call has to raise a Python exception or to return; where it returns for an index, what it returns
has to be right for the blocks that the index lists. The reference in plain PyTorch goes by the row lists
whatever the op, and both ways in which it checks an index have to say the same. The compiled kernels run
under AddressSanitizer, built into build/sanitized, in processes of their own: a signal, a report or a hang
is a fault of the case at hand, which its seed and number repeat (`--seed S --first N --count 1`).
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import faulthandler
import functools
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from dynaprune_kernels import _extension, index_check
from tests.fuzz.corruptions import CORRUPTIONS, corrupted
from tests.fuzz.kernel_problems import Problem, difference, draw_problem, public_calls, raw_calls
from tests.fuzz.malformed_calls import all_calls, malformed

ROOT = Path(__file__).resolve().parents[2]
SANITIZED = ROOT / "build" / "sanitized"
SHARED_PROBLEM = 40  # cases in a row that are made of one layer
LONGEST_SECONDS = 60  # of a case
LARGEST_ALLOCATION_MIB = 2048

Outcome = tuple[str, str]  # what was tried, what became of it


@functools.lru_cache(maxsize=2)
def _problem(seed: int, number: int) -> Problem:
    return draw_problem(f"{seed}/layer/{number}")


def try_index(seed: int, number: int) -> tuple[Outcome, str | None]:
    """One op on one corrupted index. Returns the outcome, and what is wrong with it."""
    pick = random.Random(f"{seed}/index/{number}")
    p = _problem(seed, number // SHARED_PROBLEM)
    kind = list(CORRUPTIONS)[number % len(CORRUPTIONS)]
    index = corrupted(p, kind, pick)
    if kind not in ("other_length", "other_tensor") and pick.random() < 0.1:
        return compare_checks(p, kind, index)
    backend = pick.choice(["raw", "raw", "cpu", "reference"])
    calls = (raw_calls if backend == "raw" else public_calls)(p, index)
    op = pick.choice(list(calls))
    try:
        if backend == "raw":
            results = getattr(torch.ops.dynaprune_cpu, op)(*calls[op])
        else:
            os.environ["DYNAPRUNE_BACKEND"] = backend
            name, *arguments = calls[op]
            results = getattr(torch.ops.dynaprune, name)(*arguments)
    except Exception as error:
        if isinstance(error, RuntimeError | ValueError) and "index is corrupted" in str(error):
            return (kind, "refused as corrupted"), None
        return (kind, f"refused: {type(error).__name__}"), None
    if index.is_meta:
        return (kind, "returned without memory"), None
    if index.shape != p.index.shape:  # block_saliency goes by what number of lists the index has
        wrong = op != "block_saliency" and f"{kind} {backend} {op}: returned for another length"
        return (kind, "returned for another number of lists"), wrong or None
    wrong = difference(p, op, index, results, lists_of="block_saliency" if backend == "reference" else op)
    return (kind, "right"), wrong and f"{kind} {backend} {op}: {wrong}"


def compare_checks(p: Problem, kind: str, index: Tensor) -> tuple[Outcome, str | None]:
    """The compiled check of an index beside the one in torch's ops, both of the reference."""
    said = []
    for check in (index_check.check_index, index_check.check_with_torch):
        try:
            check(index, *p.grid, p.capacity)
            said.append("right")
        except ValueError as error:
            said.append(str(error))
    wrong = said[0] != said[1] and f"{kind}: {said[0]}, without the extension: {said[1]}"
    return (kind, "right" if said[0] == "right" else "refused as corrupted"), wrong or None


def try_call(seed: int, number: int) -> tuple[Outcome, str | None]:
    """One malformed call, of the raw ops of the extension or of the ops in front of them."""
    pick = random.Random(f"{seed}/call/{number}")
    torch.manual_seed(pick.getrandbits(63))
    calls = all_calls(_problem(seed, number // SHARED_PROBLEM))
    namespace, op, arguments = calls[number % len(calls)]
    os.environ["DYNAPRUNE_BACKEND"] = pick.choice(["cpu", "cpu", "reference"])
    try:
        getattr(getattr(torch.ops, namespace), op)(*malformed(arguments, pick))
    except Exception as error:
        return (f"{namespace}.{op}", f"refused: {type(error).__name__}"), None
    return (f"{namespace}.{op}", "returned"), None


KINDS = {"indices": try_index, "calls": try_call}


def work(kind: str, seed: int, first: int, count: int, log: Path) -> None:
    """Run cases in this process. ``log`` counts each one before it runs, and says what became of it after."""
    loaded = str(_extension.load().path)
    if "libasan" in os.environ.get("LD_PRELOAD", "") and not loaded.startswith(str(SANITIZED)):
        raise RuntimeError(f"expected the extension in {SANITIZED}, got {loaded}")
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    with log.open("ab", buffering=0) as to:
        for number in range(first, first + count):
            to.write(f"CASE\t{number}\n".encode())
            faulthandler.dump_traceback_later(LONGEST_SECONDS, exit=True)
            (tried, became), wrong = KINDS[kind](seed, number)
            to.write(f"OUTCOME\t{tried}\t{became}\n".encode())
            if wrong:
                to.write(f"WRONG {kind} seed {seed} number {number}: {wrong}\n".encode())


def environment(sanitized: bool) -> dict[str, str]:
    """Of a process that runs cases."""
    paths = [str(SANITIZED)] if sanitized else []
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT / "python"), str(ROOT)])}
    if sanitized:
        compiler = os.environ.get("CXX", "c++").split()[-1]
        found = [
            subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libstdc++.so")
        ]
        variables["LD_PRELOAD"] = " ".join(found)
        variables["ASAN_OPTIONS"] = (
            "detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0:quarantine_size_mb=64:"
            f"max_allocation_size_mb={LARGEST_ALLOCATION_MIB}"
        )
    return variables


def build_sanitized() -> None:
    """Compile the CPU kernels and their bindings with AddressSanitizer into build/sanitized."""
    flags = "-fsanitize=address -fno-omit-frame-pointer"
    variables = os.environ | {
        "CFLAGS": f"{os.environ.get('CFLAGS', '')} {flags}",
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} -fsanitize=address",
        "DYNAPRUNE_NO_CUDA": "1",
        "DEBUG": "0",
    }
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(SANITIZED)]
    command += ["--build-temp", str(SANITIZED.with_name("sanitized-temp"))]
    subprocess.run(command, cwd=ROOT, env=variables, check=True, stdout=subprocess.DEVNULL)


def run(
    kind: str, seed: int, first: int, count: int, sanitized: bool
) -> tuple[dict[Outcome, int], list[str]]:
    """Run cases in a process of their own, in a new one after a case that ends it."""
    outcomes: collections.Counter[Outcome] = collections.Counter()
    faults: list[str] = []
    end = first + count
    while first < end:
        with tempfile.TemporaryDirectory(prefix="dynaprune-fuzz-") as folder:
            log = Path(folder) / "log"
            command = [sys.executable, "-m", "tests.fuzz.kernels", "--seed", str(seed), "--work", kind]
            command += ["--first", str(first), "--count", str(end - first), "--log", str(log)]
            # `-m` looks in the working directory first, where an extension without the sanitizer may lie
            done = subprocess.run(
                command,
                cwd=SANITIZED if sanitized else ROOT,
                env=environment(sanitized),
                capture_output=True,
                text=True,
            )
            lines = log.read_text().splitlines() if log.exists() else []
        begun = 0
        for line in lines:
            if line.startswith("CASE"):
                begun += 1
            elif line.startswith("OUTCOME"):
                _, tried, became = line.split("\t")
                outcomes[tried, became] += 1
            else:
                faults.append(line)
        if done.returncode == 0 and begun == end - first:
            break
        at = f"number {first + begun - 1}" if begun else "before its first case"
        faults.append(f"ENDED {kind} seed {seed} {at}: code {done.returncode}\n{done.stderr[-4000:]}")
        if not begun or len(faults) > 20:
            faults.append("given up")
            break
        outcomes["any", "ended the process"] += 1
        first += begun
    return outcomes, faults


def fuzz(
    kind: str, seed: int, first: int, count: int, *, sanitized: bool, processes: int = 1
) -> tuple[dict[Outcome, int], list[str]]:
    """Run cases ``first`` .. ``first + count`` of ``kind``; outcomes by what was tried, and the faults."""
    cuts = [first + count * i // processes for i in range(processes + 1)]
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        parts = pool.map(
            lambda at: run(kind, seed, cuts[at], cuts[at + 1] - cuts[at], sanitized), range(processes)
        )
    outcomes: collections.Counter[Outcome] = collections.Counter()
    faults: list[str] = []
    for some, wrong in parts:
        outcomes.update(some)
        faults += wrong
    return dict(outcomes), faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="drawn anew without one")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100_000, help="of each kind")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without-sanitizer", action="store_true")
    parser.add_argument("--work", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.seed, given.first, given.count, given.log)
        return
    if not given.without_sanitizer:
        build_sanitized()
    seed = secrets.randbelow(2**31) if given.seed is None else given.seed
    failed = False
    for kind in given.kind or KINDS:
        begin = time.monotonic()
        outcomes, faults = fuzz(
            kind,
            seed,
            given.first,
            given.count,
            sanitized=not given.without_sanitizer,
            processes=given.processes,
        )
        for (tried, became), times in sorted(outcomes.items()):
            print(f"{kind:8} {tried:45} {became:32} {times:7}")
        print(*faults, sep="\n")
        seconds = time.monotonic() - begin
        print(f"{kind}: seed {seed}, {sum(outcomes.values())} cases, {len(faults)} faults, {seconds:.0f} s")
        failed |= bool(faults)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
