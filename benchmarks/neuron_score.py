"""How well scores rank groups of neurons, before each kind of norm: `python -m benchmarks.neuron_score`.

Networks as they are in the middle of a pruning, blocks missing at random, are trained on scikit-learn's
digits. Then every group of neurons is removed in turn, as a trial removes it, and the rise of the loss
measured. The rank correlation (Spearman's) with that rise says how good a score is: the sum over the readers'
columns, which dynaprune ranks by; the sum over the producers' rows; and magnitudes. `--write` puts the table
into a document.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from dynaprune.neurons.candidates import blocks_of_group
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import Member, NeuronGroup, NeuronMap, find_groups
from dynaprune.nn import BlockSparseLayer, swap_layers
from dynaprune.nn.calibration_mode import calibration_mode
from dynaprune.pruning.decide.neuron_order import block_sparse_layer
from dynaprune.pruning.edit.group_scores import GroupScores
from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune.pruning.observe.gradients import Observed, observe
from dynaprune.pruning.observe.scores import SecondMoment

BLOCK = 8
WIDTH, CHANNELS = 256, 128
STEPS, BATCH, OBSERVED, IMAGES = 112, 64, 60, 900
SCORES = ("readers' columns", "producers' rows", "magnitude of the rows", "magnitude of rows and columns")


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images ``[n, 64]``, standardised as a whole, and their classes ``[n]``."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float()
    return (x - x.mean()) / x.std(), torch.from_numpy(labels).long()


def perceptron(norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    """64-256-256-10 with ``norm`` before each ReLU."""
    layers: list[nn.Module] = []
    for inputs in (64, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), *([norm(WIDTH)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def convolutions(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Two 3x3 convolutions of 128 channels and stride 2, ``norm`` and ReLU behind each; a linear layer."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs in (1, CHANNELS):
        layers += [nn.Conv2d(inputs, CHANNELS, 3, 2, 1), norm(CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * CHANNELS, 10))


class Residual(nn.Module):
    """A stream of 256 channels that two blocks read and add to: its groups have many members."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, WIDTH)
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(2))
        self.inner = nn.ModuleList(nn.Linear(WIDTH, 64) for _ in range(2))
        self.outer = nn.ModuleList(nn.Linear(64, WIDTH) for _ in range(2))
        self.last = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, inner, outer in zip(self.norms, self.inner, self.outer, strict=True):
            x = x + outer(inner(norm(x).relu()).relu())
        return self.head(self.last(x).relu())


class Heads(nn.Module):
    """An image as four tokens of 16 pixels, and 32 heads of eight channels, each normed on its own."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 64)
        self.query, self.key, self.value = (nn.Linear(64, WIDTH) for _ in range(3))
        self.norm = norm(BLOCK)
        self.out = nn.Linear(WIDTH, 64)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(-1, 4, 16)).relu()
        q, k, v = (f(x).unflatten(2, (-1, BLOCK)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = self.norm(F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).relu().flatten(1))


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(width // BLOCK, width)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "none": lambda: perceptron(None),
    "BatchNorm1d": lambda: perceptron(nn.BatchNorm1d),
    "BatchNorm2d": lambda: convolutions(nn.BatchNorm2d),
    "LayerNorm": lambda: perceptron(nn.LayerNorm),
    "RMSNorm": lambda: perceptron(nn.RMSNorm),
    "GroupNorm": lambda: perceptron(_group_norm),
    "GroupNorm, convolutions": lambda: convolutions(_group_norm),
    "BatchNorm1d, residual stream": Residual,
    "LayerNorm of each head": lambda: Heads(nn.LayerNorm),
    "RMSNorm of each head": lambda: Heads(nn.RMSNorm),
}


def groups_of(model: nn.Module, x: Tensor) -> tuple[NeuronMap, bool]:
    """The groups that dynaprune finds, and true; or those that it would find if a norm over all channels did
    not forbid to cut them, and false."""
    found = find_groups(model, ExampleInputs.of(x[:4]))
    if found.groups:
        return found, True
    layers = [n for n, m in model.named_modules() if isinstance(m, BlockSparseLayer | nn.Linear | nn.Conv2d)]
    groups = []
    for producer, reader in itertools.pairwise(layers):
        width, inputs = found.widths[producer][0], found.widths[reader][1]
        read = torch.arange(inputs).view(width, -1)
        for index in torch.arange(width).split(BLOCK):
            groups.append(
                NeuronGroup(
                    (
                        Member(producer, True, False, index),
                        Member(reader, False, False, read[index].flatten()),
                    )
                )
            )
    return NeuronMap(groups, {}, found.widths), False


def thin(model: nn.Module) -> None:
    """Remove blocks at random: every block row and column keeps a share of its own, from a fifth to all."""
    for layer in model.modules():
        if isinstance(layer, BlockSparseLayer):
            taps = layer.layout.taps
            rows, columns = layer.layout.mask.shape
            share = torch.empty(rows, 1).uniform_(0.2, 1) * torch.empty(columns // taps).uniform_(
                0.2, 1
            ).repeat(taps)
            gone = torch.rand(rows, columns) >= share
            layer.values.data[layer.layout.slots_of(gone)] = 0
            layer.layout.release_(gone)


@dataclass(frozen=True)
class Trained:
    """A network, its groups, whether these can be cut, and what the scores saw of its last steps."""

    model: nn.Module
    neuron_map: NeuronMap
    cuttable: bool
    by_readers: GroupScores
    by_rows: SecondMoment
    layers: dict[str, LayerState]


def trained(build: Callable[[], nn.Module], seed: int) -> Trained:
    """Train a network; the pruner's own observation goes along for the last steps."""
    torch.manual_seed(seed)
    model = build()
    swap_layers(model, BLOCK)
    x, y = digits()
    neuron_map, cuttable = groups_of(model, x)
    thin(model)
    by_readers, by_rows = GroupScores(), SecondMoment()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    by_readers.watch(model, neuron_map, [optimizer])
    layers = {n: LayerState.of(n, m) for n, m in model.named_modules() if isinstance(m, BlockSparseLayer)}
    for step in range(STEPS):
        rows = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        if step >= STEPS - OBSERVED:
            by_readers.observe(model, 0, by_rows, step=step)
            observe(layers.values(), by_rows, optimizer, Observed())
        optimizer.step()
        schedule.step()
    return Trained(model, neuron_map, cuttable, by_readers, by_rows, layers)


@contextmanager
def without(model: nn.Module, group: NeuronGroup, *, plain: bool) -> Iterator[None]:
    """Suspend the blocks that make and read the group, as a trial does; with ``plain`` zero the columns of
    plain readers too."""
    masks = blocks_of_group(model, group)
    weights = []
    for name, blocks in masks.items():
        block_sparse_layer(model, name).layout.suspend_(blocks)
    for member in group.readers:
        layer = model.get_submodule(member.name)
        if plain and not isinstance(layer, BlockSparseLayer):
            weights.append((layer.weight.data, layer.weight.data.clone()))
            layer.weight.data[:, member.index] = 0
    yield
    for name in masks:
        block_sparse_layer(model, name).layout.resume_()
    for weight, whole in weights:
        weight.copy_(whole)


def rises(found: Trained) -> list[float]:
    """For each group, by how much the mean loss of the first images rises without it."""
    x, y = (part[:IMAGES] for part in digits())

    def loss() -> float:
        with calibration_mode(found.model), torch.no_grad():
            return float(F.cross_entropy(found.model(x).double(), y))

    whole, losses = loss(), []
    for group in found.neuron_map.groups:
        with without(found.model, group, plain=not found.cuttable):
            losses.append(loss() - whole)
    return losses


def scores(found: Trained) -> list[list[float]]:
    """A list per name in :data:`SCORES`, of a figure per group."""
    model, groups = found.model, found.neuron_map.groups
    readers = [0.0 if value is None else value for value in found.by_readers.scores(found.by_rows)]
    rows = []
    for group in groups:
        sparse = {m.name: m.index for m in group.producers if m.name in found.layers}
        figures = {n: found.by_rows.neuron_scores(found.layers[n]) for n in sparse}
        rows.append(sum(float(figures[n][index].double().sum()) for n, index in sparse.items()))
    made = [sum(squares(model, m) for m in group.producers) for group in groups]
    read = [sum(squares(model, m) for m in group.readers) for group in groups]
    return [readers, rows, made, [a + b for a, b in zip(made, read, strict=True)]]


def squares(model: nn.Module, member: Member) -> float:
    """Sum of the squares of a member's rows, or columns."""
    weight = model.get_submodule(member.name).weight.detach().double()
    return float((weight[member.index] if member.outputs else weight[:, member.index]).square().sum())


def correlations(build: Callable[[], nn.Module], seed: int) -> tuple[int, bool, list[float]]:
    """Number of groups, whether they can be cut, and Spearman's correlation for each of :data:`SCORES`."""
    found = trained(build, seed)
    truth = rises(found)
    return (
        len(truth),
        found.cuttable,
        [float(spearmanr(figures, truth).statistic) for figures in scores(found)],
    )


def table(seeds: int) -> str:
    """Means over the seeds, with the least and the largest."""
    lines = ["| norm | groups | " + " | ".join(SCORES) + " |", "|---|---|" + "---|" * len(SCORES)]
    for name, build in NETWORKS.items():
        runs = [correlations(build, seed) for seed in range(seeds)]
        count, cuttable, _ = runs[0]
        each = np.array([run[2] for run in runs])
        cells = [
            f"{mean:.2f} ({low:.2f} to {high:.2f})"
            for mean, low, high in zip(each.mean(0), each.min(0), each.max(0), strict=True)
        ]
        lines.append(
            f"| {name}{'' if cuttable else ' *'} | {count} | **{cells[0]}** | " + " | ".join(cells[1:]) + " |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="a document with the marks of the table")
    options = parser.parse_args()
    found = table(options.seeds)
    if options.write:
        text = options.write.read_text()
        marked = re.compile(r"(<!-- neuron scores -->\n).*?(<!-- /neuron scores -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"expected the marks <!-- neuron scores --> in {options.write}, got none")
        options.write.write_text(marked.sub(lambda m: f"{m[1]}{found}\n{m[2]}", text))


if __name__ == "__main__":
    main()
