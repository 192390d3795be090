"""A fixed slice of the mutated checkpoint files; `make fuzz-files` runs 10,000."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.files import KINDS, content, fuzz, network, parts, sealed


def test_mutated_files_are_refused_or_load_as_what_was_saved() -> None:
    outcomes, faults = fuzz(20 * len(KINDS), seed=1)
    assert not faults, faults
    assert sum(outcomes.values()) == 20 * len(KINDS)
    assert {kind for kind, outcome in outcomes if outcome == "refused"} == set(KINDS)


def test_a_file_that_is_sealed_again_is_the_file(tmp_path: Path) -> None:
    """What the mutations recompute is what `save` writes."""
    from dynaprune.saving.checkpoint import load, save

    data = save(network(1), tmp_path / "one.safetensors").read_bytes()
    assert sealed(*parts(data)) == data
    again = save(load(network(2, sparse=False), tmp_path / "one.safetensors"), tmp_path / "two.safetensors")
    assert again.read_bytes() == data
    assert content(load(network(4), again)) == content(load(network(5), tmp_path / "one.safetensors"))
