"""The tuner with made-up times: candidates run, wrong ones are refused, the fastest one is kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_cases, tune_triton
from benchmarks.kernel_cases import Case
from dynaprune_kernels import ConvGeometry
from dynaprune_kernels.backends import triton as kernels
from dynaprune_kernels.backends.triton import config
from dynaprune_kernels.backends.triton.launch import INTERPRETER

pytestmark = pytest.mark.interpret

LINEAR = Case("linear_forward", 70, 64, 64, 32, 0.5, torch.float32)
CONV = Case("conv2d_wgrad", 2, 32, 32, 16, 0.5, torch.float32, ConvGeometry(3, 3, 1, 1, 1, 1), (5, 5))


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    everything = tune_triton.candidates
    monkeypatch.setattr(tune_triton, "candidates", lambda *given: everything(*given)[:3])
    yield
    config.table.cache_clear()
    config._chosen.cache_clear()


@pytest.mark.parametrize("case", [LINEAR, CONV], ids=lambda case: case.op)
def test_the_fastest_candidate_is_kept(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.chain([3.0, 1.0, 2.0], itertools.repeat(7.0))
    entry = tune_triton.tune(case, "cpu", lambda call: next(times), quick=False)
    operands = kernel_cases.build(case, "cpu")
    problem = kernel_cases.problem_of(case, operands)
    second = tune_triton.candidates(problem, INTERPRETER, False)[1]
    assert entry["tile"] == second._asdict()
    assert (entry["milliseconds"], entry["dense_milliseconds"], entry["tried"]) == (1.0, 7.0, 3)

    monkeypatch.setattr(config, "FOLDER", tmp_path)
    tune_triton.write(config.file_of("interpreter"), "interpreter", entry)
    config.table.cache_clear()
    config._chosen.cache_clear()
    assert config.tile(problem, INTERPRETER) == second
    assert config.measured(problem, "interpreter") == {"triton": 1.0, "dense": 7.0}
    assert json.loads(config.file_of("interpreter").read_text())["torch"] == torch.__version__


def test_wrong_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing_a_block(x: Tensor, values: Tensor, *rest: object) -> Tensor:
        values = values.clone()
        values[0] = 0
        return right(x, values, *rest)

    right = kernels.linear_forward
    monkeypatch.setattr(kernels, "linear_forward", missing_a_block)
    with pytest.raises(RuntimeError, match="no configuration gives the right result"):
        tune_triton.tune(LINEAR, "cpu", lambda call: 1.0, quick=False)
