"""End comparisons on digits with SIGKILL at random moments, start them again, and compare how they end.

``python -m tests.experiment.kill_at_random --runs 20`` prints a line for each run and exits with 1 where one
differs from the undisturbed one in anything but times and memory. It is no test of the suite: it takes as
long as so many comparisons."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.experiment.same_course import differences

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("baseline", "pruned")
RUN = ("--epochs", "10", "--seed", "1", "--target-sparsity", "0.6", "--calibration-samples", "256")
# Within the epochs too, which take a second.
OFTEN = ("--checkpoint-minutes", "0.005")


def start(out: Path, task: list[str]) -> subprocess.Popen[bytes]:
    """A comparison in a process of its own; its arms are children of that."""
    command = [sys.executable, "-m", "dynaprune", "compare", *task, "--quiet", *OFTEN, "--out", str(out)]
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(out: Path, task: list[str]) -> float:
    """Seconds that a comparison takes that nobody disturbs."""
    begun = time.monotonic()
    process = start(out, task)
    _, complained = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{out} ended with {process.returncode}: {complained.decode()}")
    return time.monotonic() - begun


def end(process: subprocess.Popen[bytes], *, arm_only: bool) -> str:
    """SIGKILL to the comparison (its arm ends with it), or to the arm that it trains. Says to which."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if arm_only and children:
        os.kill(int(children[0]), signal.SIGKILL)
    else:
        process.kill()
    process.communicate()
    for child in children:
        while Path(f"/proc/{child}/stat").exists():
            time.sleep(0.01)
    return "arm" if arm_only and children else "comparison"


def stand(out: Path) -> str:
    """What is on the disk of the arms: a finished one, the steps of the newest checkpoint, or nothing."""
    found = []
    for arm in ARMS:
        steps = sorted((out / arm / "checkpoint").glob("step-*.safetensors"))
        done = (out / arm / "arm.json").is_file()
        found.append("finished" if done else str(int(steps[-1].stem[5:])) if steps else "-")
    return " ".join(f"{arm} {at}" for arm, at in zip(ARMS, found, strict=True))


def compared(one: Path, other: Path) -> list[str]:
    """What differs between two comparisons."""
    found = [f"{arm} {said}" for arm in ARMS for said in differences(one / arm, other / arm)]
    reports = [json.loads((out / "report.json").read_text()) for out in (one, other)]
    if any(report["interrupted"] or report["marks"] for report in reports):
        found.append("report.json: interrupted or marked")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, help="of the moments; drawn where not given, and printed")
    parser.add_argument("task", nargs="*", default=["digits", *RUN], help="a task and settings after --")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    draw = random.Random(seed)
    print(f"seed {seed}: {' '.join(given.task)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "undisturbed"
        seconds = finish(whole, given.task)
        finish(again := Path(folder) / "again", given.task)
        wrong = [f"two undisturbed runs: {said}" for said in compared(whole, again)]
        print(f"undisturbed: {seconds:.1f} s; a second one differs in {len(wrong)} places", flush=True)
        for number in range(1, given.runs + 1):
            out, moment = Path(folder) / str(number), draw.uniform(0, seconds)
            process = start(out, given.task)
            time.sleep(moment)
            what = "nothing: it had ended" if process.poll() is not None else ""
            what = what or end(process, arm_only=draw.random() < 0.5)
            at = stand(out)
            if not (out / "report.json").is_file():
                finish(out, given.task)
            found = compared(whole, out)
            wrong += [f"run {number}: {said}" for said in found]
            said = "equal" if not found else f"{len(found)} differences"
            print(f"{number:>3}  killed {what} at {moment:5.1f} s, then on disk: {at:<40} {said}", flush=True)
    for each in wrong[:50]:
        print(each)
    print(f"{given.runs - len({each.split(':')[0] for each in wrong})} of {given.runs} runs end equal")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
