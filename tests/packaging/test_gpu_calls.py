"""A dry run of the three calls to a GPU: what hangs, fails, is missing or comes too late stays alone with it.

Stub commands take the place of what needs a device; the calls' own commands are parsed by the programs that
they name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import run as kernel_benchmarks
from tests.gpu import __main__ as gpu
from tests.gpu import calls
from tests.gpu.parts import Outcome, Part, pack, run_call


def _python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


GOOD = _python("print('fine')")
HANGS = _python("import time; print('began', flush=True); time.sleep(600)")
# What no SIGTERM ends, and a child that outlives its parent.
STUBBORN = _python("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")
LEAVES_A_CHILD = _python(
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
)


def said(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.part.name: outcome.said for outcome in outcomes}


def test_whatever_happens_to_a_part_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        Part("good", GOOD, 20),
        Part("hangs", HANGS, 0.7),
        Part("wrong result", _python("assert 1 == 2, 'off by 1'"), 20),
        Part("missing tool", ("no-such-profiler", "x"), 20, tool="no-such-profiler"),
        Part("missing program", ("./no-such-program",), 20),
        Part("writes nothing", GOOD, 20, expects="rows.csv"),
        Part("leaves a child", LEAVES_A_CHILD, 20),
        Part("contestant", _python("raise SystemExit(3)"), 20, counts=False),
        Part("last", GOOD, 20),
    ]
    outcomes = run_call(parts, tmp_path, 60)
    assert said(outcomes) == {
        "good": "passed",
        "hangs": "hung",
        "wrong result": "failed (1)",
        "missing tool": "no no-such-profiler",
        "missing program": "failed to start",
        "writes nothing": "wrote no rows.csv",
        "leaves a child": "passed",
        "contestant": "failed (3)",
        "last": "passed",
    }
    assert not gpu.conclude(outcomes) and gpu.conclude([o for o in outcomes if o.good])
    assert [o.part.name for o in outcomes if not o.good] == [
        *("hangs", "wrong result", "missing tool", "missing program", "writes nothing")
    ]
    printed = capsys.readouterr().out
    assert printed.index("hangs: at most") < printed.index("hangs: hung")
    assert "off by 1" in (tmp_path / "wrong result.log").read_text()
    assert "began" in (tmp_path / "hangs.log").read_text()
    assert {row["part"]: row["said"] for row in json.loads((tmp_path / "outcomes.json").read_text())} == said(
        outcomes
    )
    with tarfile.open(pack(tmp_path, "parity")) as archive:
        assert {"parity/outcomes.json", "parity/good.log", "parity/hangs.log"} <= set(archive.getnames())


def test_a_budget_that_runs_out_ends_the_call_in_time(tmp_path: Path) -> None:
    parts = [Part("stubborn", STUBBORN, 600), Part("late", GOOD, 20), Part("later", GOOD, 20)]
    began = time.monotonic()
    outcomes = run_call(parts, tmp_path, 2)
    assert said(outcomes) == {"stubborn": "hung", "late": "not begun", "later": "not begun"}
    assert time.monotonic() - began < 30
    assert not any(outcome.good for outcome in outcomes)


def test_single_kernels_run_side_by_side_and_one_that_hangs_holds_up_nobody(tmp_path: Path) -> None:
    slow = _python("import time; time.sleep(1.5)")
    parts = [Part("hangs", HANGS, 3, together="alone")]
    parts += [Part(f"kernel {k}", slow, 30, together="alone") for k in range(3)]
    parts.append(Part("after", GOOD, 20))
    outcomes = run_call(parts, tmp_path, 60, side_by_side=4)
    assert [o.said for o in outcomes] == ["hung", "passed", "passed", "passed", "passed"]


@pytest.mark.parametrize("call", calls.CALLS)
def test_the_parts_of_a_call_fit_its_limit_and_have_names_of_their_own(call: str, tmp_path: Path) -> None:
    limit, parts_of = calls.CALLS[call]
    parts = parts_of(tmp_path, Path("watchdog.so"))
    assert len({part.name for part in parts}) == len(parts)
    # Four single kernels at a time, each of which takes a few seconds unless it hangs.
    alone = [part for part in parts if part.together]
    assert sum(part.seconds for part in parts if not part.together) + len(alone) / 4 * 15 <= limit + 5
    assert limit <= {"parity": 360, "speed": 540, "sanitizers": 480}[call]


def test_every_kernel_of_hopper_has_a_part_of_its_own(tmp_path: Path) -> None:
    parts = calls.parity(tmp_path, Path("watchdog.so"))
    alone = [part for part in parts if part.together == "alone"]
    assert len(alone) == 16 and all("watchdog.so" in part.command for part in alone)
    assert parts.index(alone[-1]) < [part.name for part in parts].index("tests-cuda")
    assert "--library" not in calls.parity(tmp_path, None)[1].command


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true",
    reason="triton is not installed",
)
def test_commands_are_what_their_programs_take(tmp_path: Path) -> None:
    """Each is started as it is: without a GPU it refuses in one line, with its own status, and no usage."""
    seen = set()
    for _, parts_of in calls.CALLS.values():
        for part in parts_of(tmp_path, None):
            command = part.command[part.command.index(sys.executable) :]
            module = command[2]
            if module in ("pytest", "dynaprune_kernels.info") or module in seen:
                continue
            seen.add(module)
            log = tmp_path / f"{module}.log"
            [outcome] = run_call([Part(module, command, 120)], tmp_path, 120)
            assert "usage:" not in log.read_text(), log.read_text()
            if module != "benchmarks.plot":
                assert outcome.said.startswith("failed") and "GPU" in log.read_text(), log.read_text()
    assert seen == {
        *("tests.gpu.one_kernel", "tests.gpu.small_set", "benchmarks.gpu_bandwidth", "benchmarks.run"),
        *("benchmarks.tune_triton", "benchmarks.plot"),
    }


def test_without_a_gpu_nothing_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["parity", "--out", str(tmp_path)]) == 2
    assert "sees no NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_call_leaves_one_packed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = {"parity": (30, lambda out, watchdog: [Part("one", GOOD, 10), Part("two", HANGS, 0.5)])}
    monkeypatch.setattr(gpu, "CALLS", {**calls.CALLS, **stub})
    monkeypatch.setattr(gpu, "device_name", lambda: "NVIDIA_H200")
    assert gpu.main(["parity", "--out", str(tmp_path)]) == 1
    with tarfile.open(tmp_path / "NVIDIA_H200" / "parity" / "parity.tar.gz") as archive:
        assert set(archive.getnames()) == {"parity/outcomes.json", "parity/one.log", "parity/two.log"}


def test_another_librarys_wrong_result_is_no_fault_of_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(kernel_benchmarks.matrix_cases("linear", "cpu", True, ["fp32"], [16]))
    assert case.block == 16
    faults: list[str] = []
    wrong = {"torch-bsr": lambda case, operands: lambda: operands.x.new_zeros(case.tokens, case.out)}
    monkeypatch.setattr(kernel_benchmarks, "PROVIDERS", wrong)
    monkeypatch.setattr(kernel_benchmarks, "comparable", lambda name, case, operands, result: result)
    assert (
        kernel_benchmarks.measured(case, "cpu", lambda call: (1.0, 1.0, 1.0), faults) == [] and faults == []
    )
    monkeypatch.setattr(kernel_benchmarks, "OURS", {"torch-bsr": None})
    assert (
        kernel_benchmarks.measured(case, "cpu", lambda call: (1.0, 1.0, 1.0), faults) == []
        and len(faults) == 1
    )
