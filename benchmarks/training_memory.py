"""Memory of the first training steps of full-size networks, dense and sparse from the first step, by kind.

    python -m benchmarks.training_memory
    python -m benchmarks.training_memory --networks bert-base-mlm --sparsity 0.9 --block 64 --out FILE.csv

Networks of transformers, built from their configurations with random weights: nothing is downloaded. Each arm
takes real steps of AdamW (fused) on random tokens in a process of its own. The sparse one begins with
``PruningConfig(initial_sparsity=...)``: random blocks, the same density in every layer that can be pruned;
embeddings, norms and the classifier stay dense. Its pruner watches every step.

Every step is measured by ``dynaprune.memory_of_step``. The figures are those of the step with the highest
peak. The resident set is the process's peak in as many steps before them, which are not measured, less what
it was before the model was built: it also has the memory that torch's own ops take inside, and what the
allocator keeps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune import PruningConfig, StepMemory, attach, memory_of_step
from dynaprune.experiment.figure_text import shown
from dynaprune.experiment.metrics import environment, held_bytes, memory_peak_from_now
from dynaprune.experiment.write import write_csv

STEPS = 5


@dataclass(frozen=True)
class Setting:
    """What is trained. ``sparsity`` None: the dense network."""

    network: str
    batch: int
    tokens: int
    block: int
    dropout: float
    sparsity: float | None = None


def _bert(kind: str, setting: Setting, **sizes: int) -> nn.Module:
    import transformers

    dropout = {"hidden_dropout_prob": setting.dropout, "attention_probs_dropout_prob": setting.dropout}
    return getattr(transformers, kind)(transformers.BertConfig(num_labels=2, **dropout, **sizes))


_TINY = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NETWORKS: dict[str, Callable[[Setting], nn.Module]] = {
    "bert-base": lambda setting: _bert("BertForSequenceClassification", setting),
    "bert-base-mlm": lambda setting: _bert("BertForMaskedLM", setting),
    "bert-tiny": lambda setting: _bert("BertForSequenceClassification", setting, **_TINY),
}


def _batch(model: nn.Module, setting: Setting, generator: torch.Generator) -> dict[str, Tensor]:
    config: Any = model.config
    shape = setting.batch, setting.tokens
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    labels = ids if setting.network.endswith("mlm") else torch.randint(2, shape[:1], generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trained(setting: Setting, steps: int) -> dict[str, Any]:
    """The figures of ``steps`` measured steps, after as many that are not: bytes by name, and the losses."""
    torch.manual_seed(0)
    generator, device = torch.Generator().manual_seed(1), torch.device("cpu")
    with torch.device("meta"):
        NETWORKS[setting.network](setting)  # what it imports is there before memory is read
    with memory_peak_from_now(device) as resident:
        before = held_bytes(device) or 0
        model = NETWORKS[setting.network](setting).train()
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
            loss = model(**_batch(model, setting, generator)).loss
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
    print(f"{setting.network}\n\n{table(found)}\n")
    for name, arm in (("dense", dense), ("sparse", sparse)):
        print(f"losses, {name}: {', '.join(f'{loss:.3f}' for loss in arm['losses'])}")
    print(flush=True)
    return [{"network": setting.network, **row} for row in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures dense and sparse arms, prints their tables, and writes a CSV file where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = ["bert-base", "bert-base-mlm"]
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=default)
    parser.add_argument("--sparsity", type=float, default=0.8, help="of the layers that can be pruned")
    parser.add_argument("--block", type=int, default=32, help="edge of a block, 8 to 128")
    parser.add_argument("--batch", type=int, default=4, help="texts in a batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a text")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=STEPS, help="measured steps, after as many that are not")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    options = parser.parse_args(arguments)
    if not 0 < options.sparsity < 1:
        parser.error(f"--sparsity must be above 0 and below 1, got {options.sparsity}")
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    sizes = {key: getattr(options, key) for key in ("batch", "tokens", "block", "dropout")}
    where = environment(torch.device("cpu"))
    machine = {
        **{"sparsity": options.sparsity, **sizes, "steps": options.steps},
        **{key: where[key] for key in ("cpu", "cpu_kernels", "threads", "commit")},
        "torch": where["versions"]["torch"],
        "transformers": version("transformers"),
    }
    found = [
        row
        for network in options.networks
        for row in compared(Setting(network, **sizes), options.sparsity, options.steps)
    ]
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(options.out, [{**row, **machine} for row in found])
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
