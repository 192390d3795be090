"""What groups of neurons are ranked by, against what really happens to the loss without each of them.

The networks, and what is measured of them, are those of ``benchmarks.neuron_score``.
"""

from __future__ import annotations

import pytest

from benchmarks.neuron_score import NETWORKS, SCORES, correlations

pytest.importorskip("sklearn")

# LayerNorm and RMSNorm: of each head, where dynaprune cuts; docs/neurons.md has the norms where it does not.
CASES = {
    "none": (0, 1),
    "BatchNorm1d": (0,),
    "BatchNorm2d": (0,),
    "BatchNorm1d, residual stream": (0, 1),
    "LayerNorm of each head": (0,),
    "RMSNorm of each head": (0,),
}
# Without a norm a row says the same as the columns that read it: the two differ by noise.
SAME_AS_ROWS = 0.1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:block-sparse ops on cpu run on the dense backend")
def test_the_readers_columns_rank_groups_as_their_removal_does(name: str) -> None:
    runs = [correlations(NETWORKS[name], seed) for seed in CASES[name]]
    assert all(count >= 30 for count, *_ in runs)
    mean = [sum(found[i] for *_, found in runs) / len(runs) for i in range(len(SCORES))]
    said = dict(zip(SCORES, mean, strict=True))
    readers, rows, *magnitudes = mean
    assert readers >= 0.6, said
    assert readers > max(magnitudes), said
    assert readers > rows - (SAME_AS_ROWS if name == "none" else 0), said
