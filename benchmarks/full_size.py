"""Training steps of full-size networks, dense and block-sparse, with random weights, masks and data.

    python -m benchmarks.full_size
    python -m benchmarks.full_size --models bert-base --sparsities 0.9 --block 64 --steps 10

ResNet-18 for CIFAR, BERT-base and wav2vec2-base, built from their configurations: nothing is downloaded. A
step is forward, backward and Adam, on a fresh batch of the real shape; every swapped layer has the same share
of random blocks live and is compacted, as after the last event of a pruned run. No neurons are cut. Dropout,
layer drop and SpecAugment are off in both, so that both do the same work in every step.

Each sparse network takes its steps in turn with a dense one, and the ratio is that of the two medians. With
one thread the process's CPU time is counted instead of wall time, which is the way to measure on a machine
that others use, too. FLOPs are torch's count of forward and backward (block-sparse ops count live blocks);
the training state is weights, gradients and Adam's moments, of the whole network and of the swapped layers.
The first convolution, the classifier, embeddings and norms stay dense: "sparsity" is that of the swapped
layers' weights.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaprune import swap_layers
from dynaprune.experiment.metrics import environment, flops_of, training_state_bytes
from dynaprune.experiment.write import write_csv
from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.edit.compaction import compact_layer, wanted_capacity

OUT = Path(__file__).parent / "results" / "full_size.csv"
WARM_UP = 2

Loss = Callable[[nn.Module, torch.Generator], Tensor]


class Problem(NamedTuple):
    """A network and the loss of one random batch of the shape ``batch`` says."""

    build: Callable[[], nn.Module]
    loss: Loss
    batch: str


def resnet18() -> nn.Module:
    """The network of the task cifar10: 11.17 M parameters, channels-last."""
    from dynaprune.experiment.tasks.resnet import CifarResNet

    return CifarResNet()


def image_loss(images: int) -> Loss:
    """Cross-entropy of ``images`` random 3x32x32 images in ten classes."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        x = torch.randint(256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return F.cross_entropy(model(x), torch.randint(10, (images,), generator=generator))

    return loss


def bert_base() -> nn.Module:
    """``BertForSequenceClassification`` of bert-base-uncased's configuration, two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def text_loss(texts: int, tokens: int) -> Loss:
    """Classification loss of ``texts`` random texts of ``tokens`` tokens."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        ids = torch.randint(1000, 30522, (texts, tokens), generator=generator)
        labels = torch.randint(2, (texts,), generator=generator)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    return loss


def wav2vec2_base() -> nn.Module:
    """``Wav2Vec2ForCTC`` of wav2vec2-base's configuration, 32 characters."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    off = dict.fromkeys(
        ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout"),
        0.0,
    )
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(vocab_size=32, layerdrop=0.0, apply_spec_augment=False, ctc_zero_infinity=True, **off)
    )


def speech_loss(clips: int, seconds: float) -> Loss:
    """CTC loss of ``clips`` random clips of 16 kHz with ten characters per second."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        audio = torch.randn(clips, int(16000 * seconds), generator=generator)
        labels = torch.randint(1, 32, (clips, int(10 * seconds)), generator=generator)
        return model(input_values=audio, labels=labels).loss

    return loss


PROBLEMS = {
    "resnet18": Problem(resnet18, image_loss(32), "32 images of 32x32"),
    "bert-base": Problem(bert_base, text_loss(8, 128), "8 texts of 128 tokens"),
    "wav2vec2-base": Problem(wav2vec2_base, speech_loss(2, 2.0), "2 clips of 2 s"),
}


class Training:
    """A network with its Adam and its own stream of batches."""

    def __init__(self, problem: Problem, sparsity: float | None = None, block: int = 32) -> None:
        torch.manual_seed(0)
        self.loss, self.generator = problem.loss, torch.Generator().manual_seed(1)
        self.model = problem.build().train()
        self.sparse: list[BlockSparseLayer] = []
        if sparsity is not None:
            swap_layers(self.model, block)
            self.sparse = [m for m in self.model.modules() if isinstance(m, BlockSparseLayer)]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.dense_values = sum(layer.live_values() for layer in self.sparse)
        if sparsity:
            self.step()  # gradients and moments exist, as in the middle of a run
            self._prune(sparsity)

    def _prune(self, sparsity: float) -> None:
        """Let random blocks go, in every swapped layer the same share, and compact."""
        generator = torch.Generator().manual_seed(2)
        for layer in self.sparse:
            layout = layer.layout
            live = max(1, round((1 - sparsity) * layout.blocks))
            mask = torch.zeros(layout.blocks, dtype=torch.bool)
            mask[torch.randperm(layout.blocks, generator=generator)[:live]] = True
            layout.update_(mask.view(layout.rows, layout.columns))
            compact_layer(layer, wanted_capacity(layer, exact=True, growing=False), [self.optimizer], [])

    def step(self) -> None:
        """One step; RuntimeError where the loss is not finite."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model, self.generator)
        loss.backward()
        self.optimizer.step()
        if not torch.isfinite(loss):
            raise RuntimeError(f"expected a finite loss, got {loss.item()}")

    def flops(self) -> int:
        """Of forward and backward of one step."""
        return flops_of(self.step)[1]

    def state_bytes(self) -> int:
        """Weights, gradients and moments."""
        return training_state_bytes(self.model, self.optimizer)["total"]

    def stored(self) -> int:
        """Weights that the swapped layers store; gradients and moments have the same shapes."""
        return sum(layer.values.numel() for layer in self.sparse)

    def sparsity(self) -> float:
        """Of the swapped layers' weights."""
        return 1 - sum(layer.live_values() for layer in self.sparse) / self.dense_values


def timed_in_turn(steps: Sequence[Callable[[], None]], number: int) -> list[list[float]]:
    """Seconds of ``number`` calls of each, in turn: CPU time with one thread, else wall time."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for step in steps:
        for _ in range(WARM_UP):
            step()
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(number):
        for step, seconds in zip(steps, taken, strict=True):
            start = clock()
            step()
            seconds.append(clock() - start)
    return taken


def measured(name: str, sparsities: Sequence[float], block: int, number: int) -> list[dict[str, Any]]:
    """One row for the dense network, then one per sparsity, each timed in turn with it."""
    problem = PROBLEMS[name]
    dense = Training(problem)
    dense_flops = dense.flops()
    dense_state = dense.state_bytes()
    all_dense: list[float] = []
    rows = []
    for sparsity in sparsities:
        sparse = Training(problem, sparsity, block)
        dense_seconds, seconds = timed_in_turn([dense.step, sparse.step], number)
        all_dense += dense_seconds
        flops, state = sparse.flops(), sparse.state_bytes()
        middle = statistics.median(dense_seconds)
        rows.append(
            {
                **_row(name, problem, sparse.model, seconds),
                "arm": "block-sparse",
                "block": block,
                "swapped_layers": len(sparse.sparse),
                "sparsity": round(sparse.sparsity(), 4),
                "dense_ms_in_turn": round(1e3 * middle, 2),
                "step_ratio": round(statistics.median(seconds) / middle, 4),
                "flops": flops,
                "flops_ratio": round(flops / dense_flops, 4),
                "state_bytes": state,
                "state_ratio": round(state / dense_state, 4),
                "swapped_state_ratio": round(sparse.stored() / sparse.dense_values, 4),
            }
        )
        del sparse
        gc.collect()
    first = _row(name, problem, dense.model, all_dense)
    ones = dict.fromkeys(("step_ratio", "flops_ratio", "state_ratio", "swapped_state_ratio"), 1.0)
    return [{**first, "arm": "dense", "flops": dense_flops, "state_bytes": dense_state, **ones}, *rows]


def _row(name: str, problem: Problem, model: nn.Module, seconds: list[float]) -> dict[str, Any]:
    return {
        "model": name,
        "batch": problem.batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": len(seconds),
        "step_ms": round(1e3 * statistics.median(seconds), 2),
        "step_ms_least": round(1e3 * min(seconds), 2),
        "step_ms_most": round(1e3 * max(seconds), 2),
    }


COLUMNS = (
    *("model", "arm", "sparsity", "block", "swapped_layers", "batch", "parameters", "steps"),
    *("step_ms", "step_ms_least", "step_ms_most", "dense_ms_in_turn", "step_ratio"),
    *("flops", "flops_ratio", "state_bytes", "state_ratio", "swapped_state_ratio"),
    *("cpu", "cpu_kernels", "threads", "clock", "torch", "transformers", "dynaprune", "commit"),
)
_SHOWN = (
    ("model", "{}"),
    ("sparsity", "{}"),
    ("step_ms", "{:.0f}"),
    ("step_ms_least", "{:.0f}"),
    ("step_ms_most", "{:.0f}"),
    ("step_ratio", "{:.2f}"),
    ("flops", "{:.3g}"),
    ("flops_ratio", "{:.2f}"),
    ("state_bytes", "{:.3g}"),
    ("state_ratio", "{:.2f}"),
    ("swapped_state_ratio", "{:.2f}"),
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; ratios are to the dense network."""
    lines = [f"| {' | '.join(key for key, _ in _SHOWN)} |", "|---|" + "---:|" * (len(_SHOWN) - 1)]
    for row in rows:
        shown = {"sparsity": "dense", **row}
        cells = [form.format(shown[key]) if key in shown else "" for key, form in _SHOWN]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _fractions(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not values or not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected fractions of at least 0 and below 1, got {text}")
    return values


def _models(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PROBLEMS):
        raise argparse.ArgumentTypeError(f"expected {', '.join(PROBLEMS)}, got {', '.join(sorted(unknown))}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes the CSV file after each network and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=_models, default=list(PROBLEMS), help=", ".join(PROBLEMS))
    parser.add_argument("--sparsities", type=_fractions, default=[0.0, 0.5, 0.8, 0.9])
    parser.add_argument("--block", type=int, default=32, help="edge of a block, 8 to 128")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each network, at least 5")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.steps < 5:
        parser.error(f"--steps must be at least 5, got {options.steps}")
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    where = environment(torch.device("cpu"))
    machine = {
        **{key: where[key] for key in ("cpu", "cpu_kernels", "threads", "commit")},
        "clock": "cpu time" if where["threads"] == 1 else "wall time",
        "torch": where["versions"]["torch"],
        "dynaprune": where["versions"]["dynaprune"],
        "transformers": version("transformers"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for name in options.models:
        found += measured(name, options.sparsities, options.block, options.steps)
        write_csv(options.out, [{key: {**machine, **row}.get(key, "") for key in COLUMNS} for row in found])
        print(f"{name} done", file=sys.stderr, flush=True)
    print(table(found))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
