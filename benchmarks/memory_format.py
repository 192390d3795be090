"""A ResNet's training step in either memory format, beside the same step of another checkout.

    python -m benchmarks.memory_format --base ../dec5832

A step is forward, backward and SGD of ResNet-18 for CIFAR in half width, all convolutions but the first
block-sparse. "contiguous" and "channels last" are the formats of the weights and of the images. The other
checkout has its own compiled extension. Each checkout runs in a process of its own, and both take their steps
in turn, one at a time, so that a busy machine hits both alike. With one thread the process's CPU time
is counted, which is the way to measure on a machine that others use, too. A ratio is that of the medians,
this checkout's time by the other's. The quartiles are those of the ratios of neighbouring steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
WARM_UP = 3


class Step:
    """One network with its optimizer and batch. Calling it trains a step and returns the seconds taken."""

    def __init__(self, memory: str, density: float, block: int, batch: int, width: float) -> None:
        from dynaprune.experiment.tasks.resnet import CifarResNet, resnet18_channels

        torch.manual_seed(0)
        self.network = CifarResNet(resnet18_channels(width)).to(memory_format=FORMATS[memory])  # type: ignore[call-overload]
        make_sparse(self.network, block, density)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, momentum=0.9)
        self.images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=FORMATS[memory])
        self.labels = torch.randint(10, (batch,))

    def forward(self) -> Tensor:
        """As ``CifarResNet.forward``, which would make every input channels-last."""
        net = self.network
        x = net.stages(net.relu(net.bn1(net.conv1(self.images))))
        return net.classifier(net.pool(x).flatten(1))

    def __call__(self) -> float:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        self.optimizer.zero_grad()
        F.cross_entropy(self.forward(), self.labels).backward()
        self.optimizer.step()
        return clock() - started


def make_sparse(network: nn.Module, block: int, density: float) -> None:
    """Swap all convolutions but the first; ``density`` of the blocks of each are live, at random."""
    from dynaprune.nn import BlockSparseConv2d

    generator = torch.Generator().manual_seed(1)
    convolutions = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)][1:]
    for name in convolutions:
        parent, _, own = name.rpartition(".")
        conv = network.get_submodule(name)
        rows, channel_blocks = -(-conv.out_channels // block), -(-conv.in_channels // block)
        columns = channel_blocks * conv.kernel_size[0] * conv.kernel_size[1]
        live = torch.randperm(rows * columns, generator=generator)[: max(1, round(density * rows * columns))]
        mask = torch.zeros(rows * columns, dtype=torch.bool).index_fill_(0, live, True)
        sparse = BlockSparseConv2d.from_dense(conv, block, mask=mask.view(rows, columns))
        setattr(network.get_submodule(parent), own, sparse)


def serve(options: argparse.Namespace) -> None:
    """Take a step of the network whose number stands in a line of the input, and print its seconds."""
    torch.set_num_threads(options.threads)
    steps = [
        Step(memory, density, options.block, options.batch, options.width)
        for memory in options.formats
        for density in options.densities
    ]
    for step in steps:
        for _ in range(WARM_UP):
            step()
    print("ready", flush=True)
    for line in sys.stdin:
        print(repr(steps[int(line)]()), flush=True)


class Checkout:
    """A process with the sources of ``root`` that takes steps on demand."""

    def __init__(self, root: Path, arguments: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "python"), str(root)])}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", *arguments]
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended with status {self.process.wait()}")
        return line

    def step(self, number: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return float(self.read())


def main() -> None:
    """Print a row per format and density."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="the other checkout, built; this one again by default")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    roots = [(options.base or ROOT).resolve(), ROOT]
    checkouts = [Checkout(root, sys.argv[1:]) for root in roots]
    for checkout in checkouts:
        checkout.read()
    names = [f"{memory}, density {density}" for memory in options.formats for density in options.densities]
    seconds: list[list[list[float]]] = [[[] for _ in names] for _ in checkouts]
    for number in range(options.rounds):
        for k in range(len(names)):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            for which in order:
                seconds[which][k].append(checkouts[which].step(k))
    for checkout in checkouts:
        checkout.process.communicate()
    print(f"block {options.block}, batch {options.batch}, {options.threads} threads, {options.rounds} rounds")
    for k, name in enumerate(names):
        base, own = (taken[k] for taken in seconds)
        low, _, high = statistics.quantiles([b / a for a, b in zip(base, own, strict=True)], n=4)
        middle = statistics.median(own) / statistics.median(base)
        print(
            f"{name}: {1e3 * statistics.median(base):.1f} ms -> {1e3 * statistics.median(own):.1f} ms, "
            f"ratio {middle:.3f} ({low:.3f} to {high:.3f}), of the fastest {min(own) / min(base):.3f}"
        )


if __name__ == "__main__":
    main()
