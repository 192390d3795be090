"""How long a training is: its steps, its passes over the data, and how many samples it has seen."""

from __future__ import annotations

from dataclasses import replace

from dynaprune.experiment.run_config import RunConfig

__all__ = ["passes", "samples_until", "total_steps", "with_steps"]


def _batches(config: RunConfig, rows: int) -> int:
    return -(-rows // config.batch_size)


def total_steps(config: RunConfig, rows: int) -> int:
    """Optimizer steps of the whole training on ``rows`` samples."""
    return config.steps or config.epochs * _batches(config, rows)


def passes(config: RunConfig, rows: int) -> int:
    """Passes over the data, the last of which may end early."""
    return -(-total_steps(config, rows) // _batches(config, rows))


def samples_until(step: int, config: RunConfig, rows: int) -> int:
    """Samples that the first ``step`` steps train on: the last batch of a pass may be smaller."""
    whole, rest = divmod(step, _batches(config, rows))
    return whole * rows + min(rest * config.batch_size, rows)


def with_steps(config: RunConfig, steps: int, rows: int) -> RunConfig:
    """The same training with ``steps`` steps; the rise of the learning rate keeps its share of them."""
    warmup = round(config.warmup_steps * steps / total_steps(config, rows))
    shorter = replace(config, steps=steps, warmup_steps=warmup)
    return replace(shorter, epochs=passes(shorter, rows))
