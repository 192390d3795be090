"""The learning rates that pilots have chosen, by arm: ``pilot.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynaprune.experiment.controls import arm_name
from dynaprune.experiment.run_config import RunConfig, differing_settings
from dynaprune.experiment.saved_results import is_number, read_json
from dynaprune.experiment.write import write_json

__all__ = [
    "PILOT_FILE",
    "PILOT_FOLDER",
    "PILOT_SEED",
    "collect",
    "find_rates",
    "read_rates",
    "with_rate",
]

PILOT_FILE, PILOT_FOLDER, PILOT_SEED = "pilot.json", "pilot", 100
_MAY_DIFFER = {"seed", "fold", "folds", "lr", "sparse_rate", "pilot", "data", "device"}


def collect(out: Path) -> Path | None:
    """Write ``out/pilot.json`` anew from the arms that have been piloted there; None where there is none."""
    found = sorted((out / PILOT_FOLDER).glob(f"*/{PILOT_FILE}"))
    if not found:
        return None
    arms = {path.parent.name: read_json(path) for path in found}
    config = next(iter(arms.values()))["config"]
    said = {"task": config["task"], "seed": PILOT_SEED, "arms": arms}
    write_json(out / PILOT_FILE, said)
    return out / PILOT_FILE


def find_rates(out: Path) -> Path | None:
    """``out/pilot.json``, with every arm that has been piloted there; None where there is none."""
    found = collect(out)
    return found if found is not None else out / PILOT_FILE if (out / PILOT_FILE).is_file() else None


def read_rates(path: Path, config: RunConfig, arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The settings of each of ``arms`` (NAME or NAME=VALUE) that a pilot has chosen: ``lr``, and of an arm
    that begins sparse ``sparse_rate``.

    Raises:
        ValueError: a damaged file, one of other settings or without one of the arms, or a reported seed that
            is the pilots'.
    """
    found = read_json(path)
    said = found.get("arms")
    if not isinstance(said, dict) or not all(_is_choice(each) for each in said.values()):
        raise ValueError(f"{path}: expected the arms with their lr, sparse_rate and config, got {said!r:.60}")
    if config.seed == found.get("seed"):
        raise ValueError(
            f"seed {config.seed} chose the learning rates in {path}, and is not reported: take other seeds"
        )
    names = [arm_name(arm) for arm in arms]
    if missing := [name for name in names if name not in said]:
        raise ValueError(f"{path} has no learning rate of {', '.join(missing)}: pilot them too (--pilot)")
    for name in names:
        other = differing_settings(said[name]["config"], config).keys() - _MAY_DIFFER
        if other:
            raise ValueError(f"{path} is of other settings ({', '.join(sorted(other))}): pilot anew")
    return {name: {"lr": said[name]["lr"], "sparse_rate": said[name]["sparse_rate"]} for name in names}


def _is_choice(said: Any) -> bool:
    return (
        isinstance(said, dict)
        and is_number(said.get("lr"))
        and said["lr"] > 0
        and isinstance(said.get("sparse_rate"), (str, type(None)))
        and isinstance(said.get("config"), dict)
    )


def with_rate(config: RunConfig, arm: str, rates: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The settings that the ``arm`` is given: those of the comparison, with its rates where it has some."""
    return replace(config, **rates.get(arm_name(arm), {}))
