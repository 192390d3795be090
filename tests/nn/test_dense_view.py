"""``layer.weight`` of a block-sparse layer: its reads, and changes through it, against a plain layer."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    parameters_to_vector,
    parametrizations,
    parametrize,
    prune,
    spectral_norm,
    vector_to_parameters,
    weight_norm,
)

from dynaprune.nn import BlockSparseConv1d, BlockSparseConv2d, BlockSparseLinear
from dynaprune.nn.dense_view import DenseView

SPARSE: dict[type[nn.Module], Any] = {
    nn.Linear: BlockSparseLinear,
    nn.Conv2d: BlockSparseConv2d,
    nn.Conv1d: BlockSparseConv1d,
}
KINDS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(21, 19),
    "conv2d": lambda: nn.Conv2d(16, 32, 3, padding=1, groups=2),
    "conv1d": lambda: nn.Conv1d(16, 24, 5, stride=2),
}


def _pair(kind: str = "linear") -> tuple[Any, Any, Tensor]:
    """A plain layer in float64, a block-sparse one with the same weight and two thirds of its blocks, and
    where they live (ones and zeros, shaped like the weight)."""
    torch.manual_seed(0)
    plain = KINDS[kind]().double()
    sparse = SPARSE[type(plain)].from_dense(copy.deepcopy(plain), 8)
    sparse.layout.update_(torch.arange(sparse.layout.blocks).view_as(sparse.layout.mask) % 3 > 0)
    live = sparse.to_dense_shape(torch.ones_like(sparse.values))
    with torch.no_grad():
        plain.weight.mul_(live)
    return plain, sparse, live


READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "matmul": lambda layer, x: F.linear(x, layer.weight.flatten(1)),
    "transposed": lambda layer, x: x @ layer.weight.flatten(1).t(),
    "norm": lambda layer, x: layer.weight.norm(),
    "absolute": lambda layer, x: layer.weight.abs().sum(),
    "power": lambda layer, x: (layer.weight**2).mean(),
    "cosine": lambda layer, x: F.linear(F.normalize(x), F.normalize(layer.weight.flatten(1), dim=1)),
    "concatenated": lambda layer, x: torch.cat([layer.weight, layer.weight * 2]),
    "a row": lambda layer, x: layer.weight[3].sum() * layer.weight[1:4].prod(),
    "chunks": lambda layer, x: layer.weight.chunk(2)[0],
    "einsum": lambda layer, x: torch.einsum("bi,oi->bo", x, layer.weight.flatten(1)),
    "in half": lambda layer, x: layer.weight.float().sum(),
    "where": lambda layer, x: torch.where(layer.weight > 0, layer.weight, 0.1),
    "stacked rows": lambda layer, x: torch.stack(list(layer.weight.flatten(1).unbind(0))).var(0),
    "used by a function of its own": lambda layer, x: _Product.apply(x, layer.weight.flatten(1)),
}


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", READS)
def test_what_reads_the_weight_sends_its_gradient_to_the_values(kind: str, read: str) -> None:
    plain, sparse, live = _pair(kind)
    x = torch.randn(4, plain.weight[0].numel(), dtype=torch.float64)
    outputs = [READS[read](layer, x) for layer in (plain, sparse)]
    torch.testing.assert_close(outputs[1], outputs[0])
    assert type(outputs[1]) is Tensor or read == "chunks"
    dy = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(sparse.to_dense_shape(sparse.values.grad), plain.weight.grad * live)
    torch.testing.assert_close(sparse.weight.grad, plain.weight.grad * live)


def test_gradients_of_gradients_pass_through_the_weight() -> None:
    plain, sparse, live = _pair()
    seen = []
    for layer, source in ((plain, plain.weight), (sparse, sparse.values)):
        (grad,) = torch.autograd.grad(layer.weight.pow(3).sum(), source, create_graph=True)
        grad.square().sum().backward()
        seen.append(source.grad)
    torch.testing.assert_close(sparse.to_dense_shape(seen[1]), seen[0] * live)


def test_what_a_weight_is_can_be_asked_without_building_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        plain, sparse, _ = _pair(kind)
        monkeypatch.setattr(type(sparse), "to_dense_shape", lambda *_: pytest.fail("the weight was built"))
        for layer in (plain, sparse):
            weight = layer.weight
            assert isinstance(weight, Tensor) and isinstance(weight, nn.Parameter)
            assert weight.dtype == torch.float64 and weight.device.type == "cpu" and not weight.is_cuda
            assert weight.shape == weight.size() == plain.weight.shape and weight.size(0) == len(weight)
            assert (
                weight.ndim == weight.dim() == plain.weight.dim() and weight.numel() == plain.weight.numel()
            )
            assert weight.requires_grad and weight.is_floating_point() and not weight.is_meta
            assert weight.stride() == plain.weight.stride() and weight.is_contiguous()
            assert weight.element_size() == 8 and not weight.is_sparse and weight.layout == torch.strided
            assert weight.grad is None and weight.data.dtype == weight.dtype
            assert weight.data.shape == plain.weight.shape and not weight.data.requires_grad
            with torch.no_grad():
                assert layer.weight.requires_grad
        monkeypatch.undo()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda m: m.weight.mul_(2),
    "imul": lambda m: m.weight.__imul__(2),
    "add_": lambda m: m.weight.add_(0.5),
    "copy_": lambda m: m.weight.copy_(torch.linspace(-1, 1, m.weight.numel()).view_as(m.weight)),
    "a row": lambda m: m.weight[2].fill_(3),
    "row assigned": lambda m: m.weight.__setitem__(2, 3.0),
    "element assigned": lambda m: m.weight.__setitem__((2, 7), 3.0),
    "mask assigned": lambda m: m.weight.__setitem__(m.weight > 0, 0.0),
    "all assigned": lambda m: m.weight.data.__setitem__(..., 0.25),
    "index_copy_": lambda m: m.weight.index_fill_(0, torch.tensor([0, 3]), 7.0),
    "transposed": lambda m: m.weight.transpose(0, 1).mul_(3),
    "flattened": lambda m: m.weight.view(-1)[5:].sub_(1),
    "detached": lambda m: m.weight.detach().mul_(2),
    "data.clamp_": lambda m: m.weight.data.clamp_(-0.05, 0.05),
    "data.mul_ of a column": lambda m: m.weight.data[:, 3].mul_(9),
    "data of data": lambda m: m.weight.data.data.add_(1),
    "data assigned": lambda m: setattr(m.weight, "data", torch.ones_like(m.weight)),
    "data assigned from itself": lambda m: setattr(m.weight, "data", m.weight.data / 2),
    "out": lambda m: torch.mul(m.weight.data, 2, out=m.weight.data),
    "foreach": lambda m: torch._foreach_mul_([m.weight.data], 0.5),
    "held": lambda m: [w := m.weight, w.mul_(2), w.add_(1)],
    "renorm": lambda m: m.weight.data.copy_(m.weight.data.renorm(2, 0, 0.1)),
    "normal_": lambda m: m.weight.data.normal_(0, 0.02),
    "zeros_": lambda m: nn.init.zeros_(m.weight),
    "constant_": lambda m: nn.init.constant_(m.weight, 2),
    "uniform_": lambda m: nn.init.uniform_(m.weight),
    "trunc_normal_": lambda m: nn.init.trunc_normal_(m.weight, std=0.02),
    "xavier_uniform_": lambda m: nn.init.xavier_uniform_(m.weight),
    "kaiming_normal_": lambda m: nn.init.kaiming_normal_(m.weight, mode="fan_out"),
    "orthogonal_": lambda m: nn.init.orthogonal_(m.weight),
    "eye_": lambda m: nn.init.eye_(m.weight) if m.weight.dim() == 2 else nn.init.dirac_(m.weight),
    "sparse_": lambda m: nn.init.sparse_(m.weight, 0.3) if m.weight.dim() == 2 else None,
    "reset_parameters": lambda m: m.reset_parameters(),
    "vector_to_parameters": lambda m: vector_to_parameters(
        parameters_to_vector([m.weight]) + 1, [m.weight, m.bias][:1]
    ),
    "init by apply": lambda m: m.apply(
        lambda each: nn.init.xavier_uniform_(each.weight) if hasattr(each, "weight") else None
    ),
}

IN_GRAD_MODE = {name for name in CHANGES if "data" in name or name.endswith("_uniform_")} | {
    "detached",
    "out",
    "foreach",
    "renorm",
    "normal_",
    "zeros_",
    "orthogonal_",
    "eye_",
    "reset_parameters",
    "vector_to_parameters",
    "init by apply",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_through_the_weight_arrives_in_the_live_blocks(kind: str, change: str) -> None:
    plain, sparse, live = _pair(kind)
    dead = sparse.layout.slot_of_block < 0
    for layer in (plain, sparse):
        torch.manual_seed(1)
        if "data" in change or change in (
            "foreach",
            "reset_parameters",
            "renorm",
            "out",
            "normal_",
            "detached",
        ):
            CHANGES[change](layer)
        else:
            with torch.no_grad():
                CHANGES[change](layer)
    torch.testing.assert_close(sparse.weight.detach() * 1, plain.weight.detach() * live, rtol=0, atol=0)
    assert torch.equal(sparse.to_dense_shape(sparse.values), plain.weight.detach() * live)
    assert torch.equal(sparse.layout.slot_of_block < 0, dead)
    assert torch.equal(sparse.bias, plain.bias) and sparse.values.requires_grad


def test_a_change_in_grad_mode_raises_as_for_a_parameter() -> None:
    for change in ("mul_", "a row", "row assigned", "transposed", "flattened"):
        plain, sparse, _ = _pair()
        before = sparse.values.detach().clone()
        for layer in (plain, sparse):
            with pytest.raises(RuntimeError, match=r"requires grad.*in.place|in-place"):
                CHANGES[change](layer)
        assert torch.equal(sparse.values, before)


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "another parameter": (
        lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(19, 21))),
        AttributeError,
        "cannot be replaced",
    ),
    "a tensor": (lambda m: setattr(m, "weight", torch.zeros(19, 21)), AttributeError, "cannot be replaced"),
    "another shape": (
        lambda m: setattr(m.weight, "data", torch.zeros(3, 3).double()),
        ValueError,
        r"\(19, 21\) torch.float64 on cpu, got \(3, 3\)",
    ),
    "another dtype": (
        lambda m: setattr(m.weight, "data", m.weight.data.half()),
        ValueError,
        "got .* torch.float16",
    ),
    "set_": (lambda m: m.weight.data.set_(torch.zeros(19, 21).double()), RuntimeError, "other memory"),
    "resize_": (lambda m: m.weight.data.resize_(3, 3), RuntimeError, "other memory"),
    "t_": (lambda m: m.weight.data.t_(), RuntimeError, "another shape"),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), AttributeError, "masked by another one"),
    "prune, custom": (
        lambda m: prune.custom_from_mask(m, "weight", torch.ones(19, 21)),
        AttributeError,
        "masked by another one",
    ),
    "old spectral norm": (lambda m: spectral_norm(m), KeyError, "weight of a block-sparse layer"),
    "old weight norm": (lambda m: weight_norm(m), KeyError, "weight of a block-sparse layer"),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m), ValueError, "does not have a parameter"),
    "weight norm": (lambda m: parametrizations.weight_norm(m), ValueError, "does not have a parameter"),
    "parametrize": (
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
        ValueError,
        "does not have a parameter",
    ),
    "tied afterwards": (lambda m: setattr(nn.Linear(21, 19), "weight", m.weight), ValueError, "non-leaf"),
    "optimizer": (lambda m: torch.optim.SGD([m.weight], 0.1), ValueError, "non-leaf"),
    "dlpack": (lambda m: torch.utils.dlpack.from_dlpack(m.weight.data), BufferError, "no dense memory"),
    "numpy": (lambda m: m.weight.detach().numpy().__setitem__(0, 0), ValueError, "read-only"),
    "a hook after the gradient": (
        lambda m: m.weight.register_post_accumulate_grad_hook(print),
        RuntimeError,
        "`values`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_what_cannot_arrive_is_refused_and_nothing_changes(name: str) -> None:
    _, sparse, _ = _pair()
    before = copy.deepcopy(sparse.state_dict())
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call(sparse)
    after = sparse.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in after)


def test_the_gradient_of_the_weight_can_be_changed_and_replaced() -> None:
    plain, sparse, live = _pair()
    x = torch.randn(5, 21, dtype=torch.float64)

    def same() -> None:
        torch.testing.assert_close(sparse.weight.grad, plain.weight.grad * live)
        torch.testing.assert_close(sparse.to_dense_shape(sparse.values.grad), plain.weight.grad * live)

    for layer in (plain, sparse):
        layer(x).square().sum().backward()
        layer.weight.grad.mul_(0.5)
        layer.weight.grad[3] = 1
        layer.weight.grad.data.clamp_(-0.1, 0.1)
    same()
    with torch.no_grad():
        plain.weight.grad.mul_(live)
    norms = [clip_grad_norm_([layer.weight, layer.bias], 0.01) for layer in (plain, sparse)]
    torch.testing.assert_close(norms[1], norms[0])
    same()
    for layer in (plain, sparse):
        layer.weight.grad = torch.full_like(layer.weight, 2)
        clip_grad_value_([layer.weight], 1.5)
    same()
    sparse.weight.grad = None
    assert sparse.values.grad is None and sparse.weight.grad is None


def test_hooks_see_the_dense_gradient_and_may_change_it() -> None:
    plain, sparse, live = _pair()
    x = torch.randn(5, 21, dtype=torch.float64)
    mask = torch.rand(19, 21, dtype=torch.float64)
    seen: list[Tensor] = []
    handles = []
    for layer in (plain, sparse):
        handles.append(layer.weight.register_hook(lambda grad: seen.append(grad) or grad * mask))
        layer(x).square().sum().backward()
    torch.testing.assert_close(seen[1], seen[0] * live)
    torch.testing.assert_close(sparse.weight.grad, plain.weight.grad * live)
    for handle, layer in zip(handles, (plain, sparse), strict=True):
        handle.remove()
        layer(x).sum().backward()
    assert len(seen) == 2


def test_freezing_the_weight_freezes_the_values() -> None:
    _, sparse, _ = _pair()
    sparse.weight.requires_grad_(False)
    assert not sparse.values.requires_grad and not sparse.weight.requires_grad
    sparse.weight.requires_grad = True
    assert sparse.values.requires_grad and sparse.weight.requires_grad


def test_copies_and_files_of_the_weight_are_plain_tensors() -> None:
    plain, sparse, _ = _pair()
    twin = copy.deepcopy(sparse.weight)
    assert type(twin) is nn.Parameter and torch.equal(twin, plain.weight)
    file = io.BytesIO()
    torch.save({"weight": sparse.weight, "of": sparse.weight.detach()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(type(t) is Tensor and torch.equal(t, plain.weight) for t in loaded.values())
    assert np.array_equal(sparse.weight.detach().numpy(), plain.weight.detach().numpy())
    assert (
        sparse.weight.tolist() == plain.weight.tolist() and sparse.weight[0, 9].item() == plain.weight[0, 9]
    )
    assert "DenseView" in repr(sparse.weight)
    copied = copy.deepcopy(sparse)
    with torch.no_grad():
        copied.weight.zero_()
    assert torch.equal(sparse.weight, plain.weight) and not copied.weight.any()


def test_a_held_weight_follows_the_values_and_is_refused_once_its_shape_changed() -> None:
    _, sparse, _ = _pair()
    held, row = sparse.weight, sparse.weight[3]
    assert float(held[0, 9].detach()) == float(sparse.weight[0, 9].detach())
    with torch.no_grad():
        sparse.values.mul_(2)
    assert torch.equal(held, sparse.weight) and torch.equal(row, sparse.weight[3])
    sparse.layout.drop_(torch.tensor([True, False, False]), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"its shape was .*read it again"):
        held.sum()


def test_suspended_blocks_keep_their_values_when_the_weight_is_written() -> None:
    _, sparse, _ = _pair()
    before = sparse.values.detach().clone()
    blocks = torch.zeros_like(sparse.layout.mask)
    blocks[0, 1] = True
    sparse.layout.suspend_(blocks)
    with torch.no_grad():
        sparse.weight.mul_(0)
    sparse.layout.resume_()
    slot = int(sparse.layout.slot_of_block[0, 1])
    assert torch.equal(sparse.values[slot], before[slot]) and before[slot].any()
    assert not sparse.weight[:, 16:].any()


def test_reading_in_every_step_is_said_once_with_the_name_and_reading_now_and_then_is_not() -> None:
    _, sparse, _ = _pair()
    sparse.reads.name = "encoder.fc"
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)

    def step(read: bool) -> None:
        loss = sparse(torch.randn(4, 21, dtype=torch.float64)).square().mean()
        if read:
            loss = loss + sparse.weight.norm()
        assert sparse.weight.dtype == torch.float64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(100):
            step(read=i % 20 == 0)
    with pytest.warns(RuntimeWarning, match="layer encoder.fc is read in every training step") as said:
        for _ in range(10):
            step(read=True)
    assert len(said) == 1


def test_a_compiled_model_reads_the_weight_without_a_graph_break() -> None:
    class Reader(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.layer.weight.dtype)
            y = F.linear(x, F.normalize(self.layer.weight), self.layer.bias)
            return y + self.layer.weight.shape[0] + self.layer.weight.t()[0].sum() + self.layer.weight.norm()

    torch._dynamo.reset()
    plain, sparse, live = _pair()
    x = torch.randn(4, 21, dtype=torch.float64)
    compiled = torch.compile(Reader(sparse), fullgraph=True, backend="aot_eager")
    outputs = [Reader(plain)(x), compiled(x)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(sparse.weight.grad, plain.weight.grad * live)
    assert isinstance(sparse.weight, DenseView)


COMPILED_CHANGES = [
    "mul_",
    "row assigned",
    "transposed",
    "flattened",
    "detached",
    "data.clamp_",
    "data.mul_ of a column",
    "all assigned",
    "out",
    "zeros_",
    "uniform_",
    "xavier_uniform_",
    "reset_parameters",
]


@pytest.mark.parametrize("change", COMPILED_CHANGES)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_that_changes_the_weight_is_refused(change: str, fullgraph: bool) -> None:
    _, sparse, _ = _pair()
    before = sparse.values.detach().clone()

    def changing(layer: Any) -> int:
        with torch.no_grad():
            CHANGES[change](layer)
        return 1

    torch._dynamo.reset()
    with pytest.raises(Exception, match="compiled code changes the weight of a block-sparse layer"):
        torch.compile(changing, backend="eager", fullgraph=fullgraph)(sparse)
    assert torch.equal(sparse.values, before)


def test_compiled_code_may_change_what_it_computed_from_the_weight() -> None:
    plain, sparse, _ = _pair()

    def reading(layer: Any, x: Tensor) -> Tensor:
        y = F.linear(x, layer.weight)
        y.mul_(2)
        scaled = layer.weight * 2
        scaled[0] = 0
        y += 1
        return torch.add(y, scaled.sum())

    torch._dynamo.reset()
    x = torch.randn(4, 21, dtype=torch.float64)
    compiled = torch.compile(reading, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(sparse, x), reading(plain, x))
