"""First steps of a language model whose dense training state would not fit, 95% sparse from the meta device.

    python -m benchmarks.large_from_meta
    python -m benchmarks.large_from_meta --size tiny --density 0.5 --block 16 --steps 3 --out FILE.csv

The network of the task ``lm`` (a Llama with rotary embeddings and grouped queries, vocabulary of 2,048) with
3 billion weights in layers that can be pruned. ``prepare`` materialises it layer by layer, with random blocks
of each. Real steps of AdamW (fused) on IMDB's text follow, each on another batch. One thread trains.

Beside the loss of each step there is that of one batch that is never trained on, before the first step and
after the last.

The dense training state is what weights, gradients and Adam's two moments of the same network take in
float32; it is never there. With one thread seconds are of the process's CPU time, which others on the machine
hardly change. The resident set is the whole process's, Python, torch and the text included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune import PruningConfig, attach, prepare
from dynaprune.experiment.metrics import environment, peak_memory_bytes, training_state_bytes
from dynaprune.experiment.report_text import shown
from dynaprune.experiment.tasks import Split
from dynaprune.experiment.tasks.llama import Size, build, llama_config, logits
from dynaprune.experiment.tasks.lm import VOCABULARY, load, losses
from dynaprune.experiment.write import write_csv

OUT = Path(__file__).parent / "results" / "large_from_meta.csv"
CPU = torch.device("cpu")
SIZES = {"3b": Size(17, 4096, 32, 8, 11008), "tiny": Size(2, 64, 4, 2, 176)}
STATE = 16  # bytes of a dense weight, its gradient and two moments in float32


def text_batches(data: str | None, batch: int, context: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """``steps`` batches of tokens and the token after each, int ``[batch, context]``, of the task's training
    part."""
    wanted = {"size": "tiny", "context": context, "tokens": batch * context * steps}
    tokens, targets = load(Split(0, source=data), wanted).train.tensors  # type: ignore[attr-defined]
    return list(zip(tokens.split(batch), targets.split(batch), strict=True))[:steps]


def on_meta(size: Size, context: int) -> nn.Module:
    """The network with shapes and no memory."""
    with torch.device("meta"):
        return build(llama_config(size, VOCABULARY, context))


def trained(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per step: its loss, its seconds, and what the network and the process took."""
    *batches, held_out = text_batches(options.data, options.batch, options.context, options.steps + 1)
    model = on_meta(SIZES[options.size], options.context).train()
    whole = sum(parameter.numel() for parameter in model.parameters())
    config = PruningConfig(
        initial_sparsity=1 - options.density,
        target_sparsity=1 - options.density,
        block_size=options.block,
        seed=0,
    )
    torch.manual_seed(0)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    prepared = prepare(model, config, device=CPU)
    prepared_at = clock()
    optimizer = torch.optim.AdamW(prepared.parameter_groups(lr=options.lr, weight_decay=0.01), fused=True)
    pruner = attach(prepared, optimizer)
    attached_at = clock()
    network: dict[str, Any] = {
        "parameters_dense": whole,
        "parameters_prunable": pruner.structure.weights,
        "sparsity": round(pruner.sparsity, 4),
        "dense_state_bytes": STATE * whole,
        "prepare_seconds": round(prepared_at - begun, 1),
        "attach_seconds": round(attached_at - prepared_at, 1),
    }
    rows: list[dict[str, Any]] = []
    network["held_out_loss_before"] = held_out_loss(model, held_out)
    for number, (tokens, targets) in enumerate(batches, 1):
        started = clock()
        optimizer.zero_grad(set_to_none=True)
        loss = losses(logits(model, tokens), targets).mean()
        loss.backward()
        optimizer.step()
        found = {
            "step": number,
            "loss": round(float(loss.detach()), 4),
            "step_seconds": round(clock() - started, 2),
            "state_bytes": training_state_bytes(model, optimizer)["total"],
            "resident_peak_bytes": peak_memory_bytes(CPU),
        }
        print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
        rows.append(found)
    network["held_out_loss_after"] = held_out_loss(model, held_out)
    return [{**row, **network} for row in rows]


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Mean loss in nats."""
    tokens, targets = batch
    return round(float(losses(logits(model, tokens), targets).mean()), 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints what it took and writes the CSV file; 1 where the held-out loss did not fall."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="3b")
    parser.add_argument("--density", type=float, default=0.05, help="of the layers that can be pruned")
    parser.add_argument("--block", type=int, default=32, help="edge of a block, 8 to 128")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="blocks of text")
    parser.add_argument("--context", type=int, default=64, help="tokens of each")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the dense layers; sparse ones have more")
    parser.add_argument("--data", help="folder with the data sets [default: DYNAPRUNE_DATA, else the hub]")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if not 0 < options.density < 1:
        parser.error(f"--density must be above 0 and below 1, got {options.density}")
    for name in ("steps", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    where = environment(CPU)
    settings = {
        name: getattr(options, name) for name in ("size", "density", "block", "batch", "context", "lr")
    }
    machine = {
        **{key: where[key] for key in ("cpu", "cpu_kernels", "threads", "commit")},
        "clock": "cpu time" if where["threads"] == 1 else "wall time",
        "torch": where["versions"]["torch"],
        "transformers": version("transformers"),
    }
    rows = trained(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(options.out, [{**row, **settings, **machine} for row in rows])
    last = rows[-1]
    print(
        f"{last['parameters_dense']:,} parameters, {last['sparsity']:.1%} of {last['parameters_prunable']:,} "
        f"left out. Training state: dense {shown(last['dense_state_bytes'], 'bytes')}, here "
        f"{shown(last['state_bytes'], 'bytes')}; peak of the resident set "
        f"{shown(last['resident_peak_bytes'], 'bytes')}. Held-out loss {last['held_out_loss_before']:.3f} to "
        f"{last['held_out_loss_after']:.3f}"
    )
    print(", ".join(f"{key} {value}" for key, value in {**settings, **machine}.items()))
    return 0 if last["held_out_loss_after"] < last["held_out_loss_before"] else 1


if __name__ == "__main__":
    sys.exit(main())
