"""Training on the GPU: graphs whose mask changes, compilation, no host sync, and the memory that is saved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaprune.nn import BlockSparseConv2d, BlockSparseLinear
from dynaprune_kernels import BlockLayout, block_saliency, block_sparse_linear
from tests.triton.parity import live_mask

pytestmark = pytest.mark.gpu


class Network(nn.Module):
    """A convolution and two linear layers, block-sparse."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        conv = nn.Conv2d(32, 64, 3, padding=1, device="cuda", dtype=dtype)
        first = nn.Linear(64, 256, device="cuda", dtype=dtype)
        second = nn.Linear(256, 128, device="cuda", dtype=dtype)
        self.conv = BlockSparseConv2d.from_dense(conv, 32)
        self.first = BlockSparseLinear.from_dense(first, 32)
        self.second = BlockSparseLinear.from_dense(second, 64)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.relu(self.conv(x)).mean((2, 3))
        return self.second(F.relu(self.first(pooled)))

    def layouts(self) -> list[BlockLayout]:
        return [module for module in self.modules() if isinstance(module, BlockLayout)]

    def prune(self) -> None:
        """Another random half of each layer's blocks lives."""
        for layout in self.layouts():
            layout.update_(live_mask("random", layout.rows, layout.columns).to("cuda"))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 32, 6, 6, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)


def gradients(network: Network, x: Tensor) -> list[Tensor]:
    """The output and every gradient of its mean square."""
    y = network(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), list(network.parameters()))]


@contextmanager
def no_sync() -> Iterator[None]:
    """A host sync inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_agree(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Network(dtype), images(dtype)
    network.prune()
    results = {}
    for name in (backend, "dense", "auto"):
        monkeypatch.setenv("DYNAPRUNE_BACKEND", name)
        results[name] = gradients(network, x)
    for name in (backend, "auto"):
        for ours, dense in zip(results[name], results["dense"], strict=True):
            error = (ours.double() - dense.double()).square().mean().sqrt()
            roundings = 4 if dtype == torch.bfloat16 else 64  # float32: of the sums, not of the results
            assert error <= roundings * torch.finfo(dtype).eps * dense.double().square().mean().sqrt()


@pytest.mark.usefixtures("backend")
def test_a_captured_step_follows_the_mask() -> None:
    network, x = Network(), images()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(network, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(network, x)
    for _ in range(3):
        network.prune()
        x.copy_(images())
        graph.replay()
        expected = gradients(network, x)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    for layout in network.layouts():
        layout.update_(torch.zeros_like(layout.mask))
    graph.replay()
    assert torch.equal(captured[0], network.second.bias.detach().expand(8, 128))


@pytest.mark.parametrize("op", ["linear_forward", "linear_dgrad", "linear_wgrad", "conv2d_forward"])
def test_the_first_launch_may_be_inside_of_a_capture(op: str, able: str) -> None:
    """In a process of its own, whose CUDA has loaded none of the kernels yet: it loads them when they are
    first launched. Triton compiles there, too."""
    code = f"""
import torch
from dynaprune_kernels import ConvGeometry
from dynaprune_kernels.backends import dispatch
from tests.triton.parity import Case, operands
conv = ConvGeometry(3, 3, 1, 1, 1, 1) if {op!r}.startswith("conv") else None
case = Case(128, 128, (64, 64), "random", 40 if conv is None else 2, torch.bfloat16, conv, (9, 8))
layout, x, values, _, bias, dy = operands(case, "cuda")
kernels = dispatch.BACKENDS[{able!r}]
run = {{
    "linear_forward": lambda: kernels.linear_forward(x, values, bias, layout.index, 128),
    "linear_dgrad": lambda: kernels.linear_dgrad(dy, values, layout.index, 128),
    "linear_wgrad": lambda: kernels.linear_wgrad(dy, x, layout.index, layout.capacity, layout.block),
    "conv2d_forward": lambda: kernels.conv2d_forward(x, values, bias, layout.index, 128, conv),
}}[{op!r}]
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = run()
graph.replay()
torch.cuda.synchronize()
assert torch.equal(captured, run())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.usefixtures("backend")
def test_the_mask_update_itself_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout(512, 512, 32, device="cuda", capacity=128, mask=live_mask("random", 16, 16) & False)
    wanted = torch.zeros(16, 16, dtype=torch.bool, device="cuda")
    layout.update_(wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layout.update_(wanted)
    monkeypatch.delenv("DYNAPRUNE_BACKEND")  # the twin is on the CPU
    twin = BlockLayout(512, 512, 32, capacity=128, mask=torch.zeros(16, 16, dtype=torch.bool))
    for _ in range(4):
        mask = torch.rand(16, 16) < 0.6
        wanted.copy_(mask)
        graph.replay()
        twin.update_(mask)
        assert torch.equal(layout.index.cpu(), twin.index)
        assert torch.equal(layout.slot_of_block.cpu(), twin.slot_of_block)


@pytest.mark.usefixtures("backend")
def test_compiled_once_for_all_masks() -> None:
    network, x = Network(), images()
    compiled = torch.compile(network, fullgraph=True)
    parameters = list(network.parameters())

    def results(module: nn.Module) -> list[Tensor]:
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y.square().mean(), parameters)]

    results(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            network.prune()
            for ours, eager in zip(results(compiled), results(network), strict=True):
                error = (ours.double() - eager.double()).square().mean().sqrt()
                assert error <= 1e-5 * eager.double().square().mean().sqrt()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("tap", [False, True], ids=["plain", "with taps"])
def test_a_step_never_waits_for_the_gpu(tap: bool) -> None:
    network, x = Network(), images()
    if tap:
        for layer in (network.conv, network.first, network.second):
            layer.enable_tap_()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        network(x).square().mean().backward()
        for layer in (network.conv, network.first, network.second):
            saliency = block_saliency(layer.values, layer.values.grad, layer.layout)
            threshold = saliency.weight_grad_abs.mean()
            layer.layout.update_(layer.layout.mask & (saliency.weight_grad_abs >= 0.1 * threshold))
        optimizer.step()

    step()
    with no_sync():
        step()


@pytest.mark.usefixtures("backend")
def test_autocast_computes_in_bfloat16() -> None:
    network, x = Network(), images()
    with torch.autocast("cuda", torch.bfloat16):
        y = network(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


@pytest.mark.usefixtures("backend")
def test_a_tenth_of_the_blocks_takes_a_tenth_of_the_memory() -> None:
    def held(sparse: bool) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        linear = nn.Linear(2048, 2048, bias=False, device="cuda")
        layer: nn.Module = linear
        if sparse:
            mask = torch.zeros(32 * 32, dtype=torch.bool)
            mask[torch.randperm(32 * 32)[:102]] = True
            layer = BlockSparseLinear.from_dense(linear, 64, mask=mask.view(32, 32))
        del linear
        optimizer = torch.optim.Adam(layer.parameters(), fused=True)
        layer(torch.randn(16, 2048, device="cuda")).sum().backward()
        optimizer.step()
        return torch.cuda.memory_allocated() - before

    held(sparse=False)
    dense, sparse = held(sparse=False), held(sparse=True)
    assert dense >= 4 * 2048 * 2048 * 4, "weight, gradient and two moments"
    assert sparse <= 0.12 * dense


def test_unsupported_blocks_run_dense_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaprune_kernels.backends.dispatch._said", set())
    layout = BlockLayout(24, 48, (8, 24), device="cuda")
    values = torch.randn(layout.capacity, 24, 8, device="cuda")
    with pytest.warns(RuntimeWarning, match="blocks of 16, 32, 64 and 128"):
        block_sparse_linear(torch.randn(3, 48, device="cuda"), values, None, layout)
