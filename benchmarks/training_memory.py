"""Memory of the first training steps of full-size networks, dense and sparse from the first step, by kind.

    python -m benchmarks.training_memory
    python -m benchmarks.training_memory --networks bert-base-mlm --sparsity 0.9 --block 64 --out FILE.csv

Networks of transformers, built from their configurations, and ResNet-18 for CIFAR, with random weights:
nothing is downloaded. Each arm takes real steps of AdamW (fused) on random tokens or images in a process of
its own. The sparse one begins with ``PruningConfig(initial_sparsity=...)``: random blocks, the same density
in every layer that can be pruned; embeddings, norms, the first convolution and the classifier stay dense. Its
pruner watches every step.

Every step is measured by ``dynaprune.memory_of_step``. The figures are those of the step with the highest
peak. The resident set is the process's peak in as many steps before them, which are not measured, less what
it was before the model was built: it also has the memory that torch's own ops take inside, and what the
allocator keeps.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.full_size import image_loss
from dynaprune import PruningConfig, StepMemory, attach, memory_of_step
from dynaprune.experiment.figure_text import shown
from dynaprune.experiment.metrics import environment, held_bytes, memory_peak_from_now
from dynaprune.experiment.write import write_csv

OUT = Path(__file__).parent / "results" / "training_memory.csv"
STEPS = 5


@dataclass(frozen=True)
class Setting:
    """What is trained. ``sparsity`` None: the dense network; ``tokens``: of a text."""

    network: str
    batch: int
    tokens: int
    block: int
    dropout: float
    sparsity: float | None = None


class Network(NamedTuple):
    """A network, the loss of one random batch, and the batch, block and dropout that it has by default."""

    build: Callable[[Setting], nn.Module]
    loss: Callable[[nn.Module, Setting, torch.Generator], Tensor]
    batch: int
    block: int
    dropout: float


def _bert(kind: str, setting: Setting, **sizes: Any) -> nn.Module:
    import transformers

    dropout = {"hidden_dropout_prob": setting.dropout, "attention_probs_dropout_prob": setting.dropout}
    return getattr(transformers, kind)(transformers.BertConfig(num_labels=2, **dropout, **sizes))


def _llama(setting: Setting) -> nn.Module:
    from dynaprune.experiment.tasks.llama import SIZES, build, llama_config
    from dynaprune.experiment.tasks.lm import VOCABULARY

    return build(llama_config(SIZES["base"], VOCABULARY, setting.tokens, setting.dropout))


def _resnet(share: int, setting: Setting) -> nn.Module:
    from dynaprune.experiment.tasks.resnet import CifarResNet

    return CifarResNet([width // share for width in (64, 128, 256, 512)], dropout=setting.dropout)


def _text_loss(model: nn.Module, setting: Setting, generator: torch.Generator) -> Tensor:
    """Of the labels of texts, or of all their tokens where the model predicts tokens."""
    config: Any = model.config
    shape = setting.batch, setting.tokens
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    labels = torch.randint(2, shape[:1], generator=generator) if _classifies(model) else ids
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss


def _classifies(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _image_loss(model: nn.Module, setting: Setting, generator: torch.Generator) -> Tensor:
    return image_loss(setting.batch)(model, generator)


_TINY = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_DEFAULT = ("bert-base", "bert-base-mlm", "lm-base", "resnet18", "resnet18-half")
NETWORKS = {
    "bert-base": Network(partial(_bert, "BertForSequenceClassification"), _text_loss, 4, 32, 0.1),
    "bert-base-mlm": Network(partial(_bert, "BertForMaskedLM"), _text_loss, 4, 32, 0.1),
    "bert-tiny": Network(partial(_bert, "BertForSequenceClassification", **_TINY), _text_loss, 4, 16, 0.1),
    "lm-base": Network(_llama, _text_loss, 2, 16, 0.0),
    "resnet18": Network(partial(_resnet, 1), _image_loss, 64, 16, 0.0),
    "resnet18-half": Network(partial(_resnet, 2), _image_loss, 64, 16, 0.0),
}


def trained(setting: Setting, steps: int) -> dict[str, Any]:
    """The figures of ``steps`` measured steps, after as many that are not: bytes by name, and the losses."""
    torch.manual_seed(0)
    generator, device = torch.Generator().manual_seed(1), torch.device("cpu")
    network = NETWORKS[setting.network]
    with torch.device("meta"):
        network.build(setting)  # what it imports is there before memory is read
    with memory_peak_from_now(device) as resident:
        before = held_bytes(device) or 0
        model = network.build(setting).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        pruner = None
        if setting.sparsity is not None:
            config = PruningConfig(
                initial_sparsity=setting.sparsity,
                target_sparsity=setting.sparsity,
                block_size=setting.block,
                total_steps=1000,
                seed=0,
            )
            pruner = attach(model, optimizer, config)
        losses: list[float] = []

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss = network.loss(model, setting, generator)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))

        for _ in range(steps):
            step()
        peak = resident()
        measured = [memory_of_step(model, optimizer, step, pruner=pruner) for _ in range(steps)]
    if not all(torch.isfinite(torch.tensor(losses))):
        raise RuntimeError(f"expected finite losses, got {losses}")
    largest = max(measured, key=lambda found: found.peak)
    over = None if peak is None else peak - before
    return {**_figures(largest), "peak of the resident set": over, "losses": losses}


def _figures(found: StepMemory) -> dict[str, int]:
    return {
        **{f"{kind} at the peak": size for kind, size in asdict(found.at_peak).items()},
        "peak of tensors": found.peak,
        "training state": found.training_state,
        "activations at their most": found.most.activations,
    }


def in_a_process(setting: Setting, steps: int) -> dict[str, Any]:
    """``trained`` in a new process, whose memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_alone, setting, steps, torch.get_num_threads()).result()


def _alone(setting: Setting, steps: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return trained(setting, steps)


def rows(dense: dict[str, Any], sparse: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per figure of both arms, with the ratio sparse / dense."""
    names = [name for name in dense if name != "losses" and (dense[name] or sparse[name])]  # no rows of zeros
    return [
        {
            "figure": name,
            "dense_bytes": dense[name],
            "sparse_bytes": sparse[name],
            "ratio": round(sparse[name] / dense[name], 4) if dense[name] and sparse[name] else "",
        }
        for name in names
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| | dense | sparse | ratio |", "|---|---:|---:|---:|"]
    for row in found:
        sizes = [shown(row[key], "bytes") for key in ("dense_bytes", "sparse_bytes")]
        ratio = "" if row["ratio"] == "" else f"{row['ratio']:.3f}"
        lines.append(f"| {row['figure']} | {' | '.join(sizes)} | {ratio} |")
    return "\n".join(lines)


def compared(setting: Setting, sparsity: float, steps: int) -> list[dict[str, Any]]:
    """Measures both arms of a network, prints their table and returns its rows."""
    dense, sparse = (in_a_process(each, steps) for each in (setting, replace(setting, sparsity=sparsity)))
    found = rows(dense, sparse)
    shape = {key: getattr(setting, key) for key in ("network", "batch", "block", "dropout")}
    print(f"{', '.join(f'{key} {value}' for key, value in shape.items())}\n\n{table(found)}\n")
    for name, arm in (("dense", dense), ("sparse", sparse)):
        print(f"losses, {name}: {', '.join(f'{loss:.3f}' for loss in arm['losses'])}")
    print(flush=True)
    return [{**shape, **row} for row in found]


def _setting(name: str, options: argparse.Namespace) -> Setting:
    own = NETWORKS[name]
    batch, block = options.batch or own.batch, options.block or own.block
    dropout = own.dropout if options.dropout is None else options.dropout
    return Setting(name, batch, options.tokens, block, dropout)


def _write(path: Path, network: str, found: Sequence[dict[str, Any]]) -> None:
    """Put the rows of a network into the file, in place of its earlier ones; those of others stay."""
    others: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if row["network"] != network]
    write_csv(path, sorted([*others, *found], key=lambda row: list(NETWORKS).index(row["network"])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures dense and sparse arms, prints their tables, and writes the rows of each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(_DEFAULT))
    parser.add_argument("--sparsity", type=float, default=0.8, help="of the layers that can be pruned")
    parser.add_argument("--block", type=int, help="edge of a block, 8 to 128; by default the network's own")
    parser.add_argument("--batch", type=int, help="texts or images; by default the network's own number")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a text")
    parser.add_argument("--dropout", type=float, help="by default the network's own")
    parser.add_argument("--steps", type=int, default=STEPS, help="measured steps, after as many that are not")
    parser.add_argument("--out", type=Path, default=OUT, help="the CSV file")
    options = parser.parse_args(arguments)
    if not 0 < options.sparsity < 1:
        parser.error(f"--sparsity must be above 0 and below 1, got {options.sparsity}")
    for name in ("steps", "batch"):
        if (given := getattr(options, name)) is not None and given < 1:
            parser.error(f"--{name} must be at least 1, got {given}")
    where = environment(torch.device("cpu"))
    machine = {
        **{"sparsity": options.sparsity, "tokens": options.tokens, "steps": options.steps},
        **{key: where[key] for key in ("cpu", "cpu_kernels", "threads", "commit")},
        "torch": where["versions"]["torch"],
        "transformers": version("transformers"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        found = compared(_setting(name, options), options.sparsity, options.steps)
        _write(options.out, name, [{**row, **machine} for row in found])
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
