"""What a pruner's report says of the whole network: what stays whole, why, and what share of it is gone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune import Pruner, PruningConfig
from dynaprune.nn import swap_layers
from tests.pruning.attached import STEPS, adam, mlp, settings, train

HIDDEN = 64 * 32 + 64 * 64
OF_THE_WHOLE = ("layers", "parameters", "sparsity", "sparsity_of_model")


class Beside(nn.Module):
    """Layers to prune, 32-64-64-4, and something else that is trained with them."""

    def __init__(self, other: nn.Module, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.other, self.use = other, use
        self.first, self.middle = nn.Linear(32, 64), nn.Linear(64, 64)
        self.classifier = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.classifier(self.middle(self.first(x).relu()).relu())
        return y + self.use(self.other, x).mean()


class Experts(nn.Module):
    """A mixture of experts in the manner of Mixtral: one 3-D parameter per projection, and a router."""

    def __init__(self, experts: int = 4, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, width) / 8)
        self.up = nn.Parameter(torch.randn(experts, inner, width) / 8)
        self.down = nn.Parameter(torch.randn(experts, width, inner) / 8)

    def forward(self, x: Tensor) -> Tensor:
        every = torch.einsum("bd,eid->bei", x, self.up).relu()
        return torch.einsum("bei,edi,be->bd", every, self.down, (x @ self.router.T).softmax(-1))


class Matrix(nn.Module):
    """A layer of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 8))
        self.scale = nn.Parameter(torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * self.scale


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(8, 32)


def attention() -> nn.Module:
    return nn.MultiheadAttention(32, 4, kdim=16, vdim=16, add_bias_kv=True)


def rows(x: Tensor) -> Tensor:
    return x.abs().sum(1).long() % 5


Kind = tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], dict[str, str]]
KINDS: dict[str, Kind] = {
    "Embedding": (lambda: nn.Embedding(5, 8), lambda m, x: m(rows(x)), {"": "torch's Embedding has no"}),
    "EmbeddingBag": (
        lambda: nn.EmbeddingBag(5, 8),
        lambda m, x: m(rows(x)[:, None]),
        {"": "torch's EmbeddingBag has no block-sparse form"},
    ),
    "LSTM": (
        lambda: nn.LSTM(32, 8, 2, bidirectional=True),
        lambda m, x: m(x)[0],
        {
            f".weight_{which}_l{layer}{end}": "torch's LSTM has no block-sparse form"
            for which in ("ih", "hh")
            for layer in (0, 1)
            for end in ("", "_reverse")
        },
    ),
    "LSTM of one feature": (
        lambda: nn.LSTM(1, 8),
        lambda m, x: m(x[:, :1])[0],
        {f".weight_{which}_l0": "torch's LSTM has no block-sparse form" for which in ("ih", "hh")},
    ),
    "GRU": (
        lambda: nn.GRU(32, 8),
        lambda m, x: m(x)[0],
        {f".weight_{which}_l0": "torch's GRU has no block-sparse form" for which in ("ih", "hh")},
    ),
    "RNNCell": (
        lambda: nn.RNNCell(32, 8),
        lambda m, x: m(x),
        {f".weight_{which}": "torch's RNNCell has no block-sparse form" for which in ("ih", "hh")},
    ),
    "ConvTranspose1d": (
        lambda: nn.ConvTranspose1d(4, 8, 3),
        lambda m, x: m(x.view(-1, 4, 8)),
        {"": "torch's ConvTranspose1d has no block-sparse form"},
    ),
    "Conv3d": (
        lambda: nn.Conv3d(4, 8, 2),
        lambda m, x: m(x.view(-1, 4, 2, 2, 2)),
        {"": "torch's Conv3d has no block-sparse form"},
    ),
    "Bilinear": (
        lambda: nn.Bilinear(16, 16, 1),
        lambda m, x: m(x[:, :16], x[:, 16:]),
        {"": "torch's Bilinear has no block-sparse form"},
    ),
    "MultiheadAttention": (
        attention,
        lambda m, x: m(x, x[:, :16], x[:, 16:])[0],
        {
            **{f".{w}_proj_weight": "torch's MultiheadAttention has no block-sparse form" for w in "qkv"},
            ".out_proj": "its weight is read by MultiheadAttention directly",
        },
    ),
    "Conv1D of transformers": (
        conv1d,
        lambda m, x: m(x),
        {"": "transformers's Conv1D has no block-sparse form"},
    ),
    "a layer of one's own": (Matrix, lambda m, x: m(x), {"": "Matrix has no block-sparse form"}),
    "stacked experts": (
        Experts,
        lambda m, x: m(x),
        {
            ".up": "4 matrices of 48x32 in one parameter of .* Experts",
            ".down": "4 matrices of 32x48 in one parameter of .* Experts",
            ".router": "a parameter of .* Experts itself, which has no block-sparse form",
        },
    ),
    "a list of parameters": (
        lambda: nn.ParameterList([torch.randn(32, 8), torch.randn(8, 4)]),
        lambda m, x: x @ m[0] @ m[1],
        {".0": "a parameter in a ParameterList", ".1": "a parameter in a ParameterList"},
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 8)),
        lambda m, x: m(x),
        {"": "its weight is parametrized"},
    ),
    "weight norm, the old one": (
        lambda: nn.utils.weight_norm(nn.Linear(32, 8)),
        lambda m, x: m(x),
        {"": "its weight is parametrized"},
    ),
    "norms and vectors": (
        lambda: nn.Sequential(nn.LayerNorm((4, 8)), nn.PReLU(4), nn.BatchNorm1d(4)),
        lambda m, x: m(x.view(-1, 4, 8)),
        {},
    ),
}
# Parameters of two dimensions or more that are summed as "other": of norms, and vectors.
VECTORS = {"MultiheadAttention": 2 * 32, "a layer of one's own": 8, "norms and vectors": 2 * 32}


def attach_beside(kind: str, **changes: Any) -> tuple[Beside, torch.optim.Optimizer, Pruner, int]:
    torch.manual_seed(2)
    make, use, _ = KINDS[kind]
    model = Beside(make(), use)
    total = sum(p.numel() for p in model.parameters())
    optimizer = adam(model)
    return model, optimizer, dynaprune.attach(model, optimizer, settings(**changes)), total


def check_account(pruner: Pruner, total: int) -> dict[str, Any]:
    """The report, in which every parameter counts once and the live ones are those that the model has."""
    report = pruner.report()
    counted = sum(layer["weights"] for layer in report["layers"].values()) + report["parameters"]["other"]
    assert counted == report["parameters"]["total"] == total
    swapped = {id(layer.values) for layer in pruner.layers.values()}
    rest = sum(p.numel() for p in pruner.model.parameters() if id(p) not in swapped)
    live = rest + pruner.structure.live_weights
    assert report["parameters"]["live"] == live
    assert report["sparsity_of_model"] == pruner.sparsity_of_model == 1 - live / total
    assert pruner.figures()["sparsity_of_model"] == report["sparsity_of_model"]
    return report


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neurons", [False, True])
def test_what_has_no_block_sparse_form_is_among_the_layers(kind: str, neurons: bool) -> None:
    model, optimizer, pruner, total = attach_beside(kind, neurons=neurons)
    before = check_account(pruner, total)
    assert before["sparsity_of_model"] == 0 and before["parameters"]["prunable"] == HIDDEN
    train(model, optimizer)
    report = check_account(pruner, total)
    beside = {name: layer for name, layer in report["layers"].items() if name.startswith("other")}
    expected = {f"other{end}": reason for end, reason in KINDS[kind][2].items()}
    assert set(beside) == set(expected)
    for name, reason in expected.items():
        assert re.search(reason, beside[name]["exempt"]), (name, beside[name])
        assert beside[name]["density"] == 1
    matrices = sum(p.numel() for p in model.other.parameters() if p.dim() > 1)
    assert sum(layer["weights"] for layer in beside.values()) == matrices - VECTORS.get(kind, 0)
    assert report["sparsity"] >= 0.75
    if not neurons:
        assert report["sparsity_of_model"] == pytest.approx(0.75 * HIDDEN / total)
    pruner.finalize()
    after = check_account(pruner, total)
    assert {key: after[key] for key in OF_THE_WHOLE} == {key: report[key] for key in OF_THE_WHOLE}


def test_the_sparsity_of_a_mixtral_is_not_that_of_its_experts() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    total = sum(p.numel() for p in model.parameters())
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(target_sparsity=0.6))
    tokens = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    report = check_account(pruner, total)
    experts = {n: layer for n, layer in report["layers"].items() if ".experts" in n or ".gate" in n}
    assert len(experts) >= 4 and all("no block-sparse form" in layer["exempt"] for layer in experts.values())
    weights = sum(layer["weights"] for layer in experts.values())
    assert weights == 2 * 4 * (3 * 32 * 64 + 32) and weights > 0.7 * total
    assert 0.6 <= report["sparsity"] < 0.62
    prunable = 2 * (2 * 32 * 32 + 2 * 16 * 32)
    assert report["parameters"]["prunable"] == prunable
    assert report["sparsity_of_model"] == pytest.approx(report["sparsity"] * prunable / total)
    assert report["sparsity_of_model"] < 0.1


def test_a_tied_weight_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.bag = nn.Embedding(9, 32), nn.EmbeddingBag(9, 32)
            self.decoder = nn.Linear(32, 9, bias=False)
            self.hidden, self.classifier = nn.Linear(32, 32), nn.Linear(32, 4)
            self.decoder.weight = self.bag.weight = self.embedding.weight
            self.twice = self.hidden

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.hidden(x)) + self.embedding(rows(x)) + self.bag(rows(x)[:, None])
            return self.classifier(x) + self.decoder(x).mean()

    model = Tied()
    total = sum(p.numel() for p in model.parameters())
    assert total == 9 * 32 + 33 * 32 + 33 * 4
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer)
    layers = check_account(pruner, total)["layers"]
    assert set(layers) == {"embedding", "bag", "hidden", "classifier", "decoder"}
    assert layers["embedding"]["weights"] == 9 * 32 and layers["hidden"]["density"] == 0.25
    for name in ("bag", "decoder"):
        assert layers[name]["weights"] == 0 and layers[name]["density"] == 1
        assert layers[name]["exempt"].endswith("; it counts under embedding")
    assert "tied" in layers["decoder"]["exempt"]


def test_frozen_weights_and_those_that_no_optimizer_holds_say_so() -> None:
    torch.manual_seed(0)
    model = Beside(
        nn.ModuleList([nn.Embedding(5, 8), nn.GRU(32, 8), nn.Linear(32, 32), nn.Linear(32, 32)]),
        lambda m, x: m[3](m[2](x)) + m[0](rows(x)).mean() + m[1](x)[0].mean(),
    )
    model.other[0].requires_grad_(False)
    model.other[2].requires_grad_(False)
    held = [p for name, p in model.named_parameters() if not name.startswith(("other.1", "other.3"))]
    pruner = dynaprune.attach(model, torch.optim.SGD(held, 0.1), settings())
    said = {name: layer["exempt"] for name, layer in pruner.report()["layers"].items()}
    assert said["other.0"] == "torch's Embedding has no block-sparse form; it is frozen"
    assert said["other.1.weight_ih_l0"].endswith("has no block-sparse form; no optimizer given holds it")
    assert said["other.2"] == "it is frozen"
    assert said["other.3"] == "no optimizer given holds its weight"
    assert {"first", "middle"} == {name for name, reason in said.items() if not reason}


def test_frozen_block_sparse_layers_are_exempt() -> None:
    model = mlp()
    swap_layers(model, 8)
    model[0].requires_grad_(False)
    total = sum(p.numel() for p in model.parameters())
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer)
    report = check_account(pruner, total)
    assert report["layers"]["0"] == {"density": 1.0, "exempt": "it is frozen", "weights": 64 * 32}
    assert report["sparsity"] == 0.75 and report["parameters"]["prunable"] == 64 * 64
    pruner.detach()
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"can be pruned on, got none: 0: it is frozen.*; 2: it is frozen"):
        dynaprune.attach(model, adam(model), settings())


def test_layers_of_types_that_are_not_asked_for_are_named() -> None:
    model = Beside(nn.Conv1d(4, 16, 3), lambda m, x: m(x.view(-1, 4, 8)))
    pruner = dynaprune.attach(model, adam(model), settings(types=("linear",)))
    assert pruner.report()["layers"]["other"]["exempt"] == "torch's Conv1d is not among the types to prune"


def test_cut_neurons_leave_what_is_not_prunable_too() -> None:
    model, optimizer, pruner, total = attach_beside("Embedding", neurons=True, target_sparsity=0.9)
    train(model, optimizer)
    report = check_account(pruner, total)
    assert report["neurons_removed"] > 0
    classifier = report["layers"]["classifier"]
    assert classifier["weights"] == 4 * 64 and classifier["exempt"].startswith("the classifier")
    assert classifier["density"] == model.classifier.in_features / 64 < 1
    bias = 64 - model.first.out_features + 64 - model.middle.out_features
    gone = report["sparsity"] * HIDDEN + 4 * (64 - model.classifier.in_features) + bias
    assert report["sparsity_of_model"] == pytest.approx(gone / total)


def test_a_resumed_and_a_loaded_model_keep_their_figures(tmp_path: Path) -> None:
    model, optimizer, pruner, total = attach_beside("GRU", neurons=True, target_sparsity=0.9)
    train(model, optimizer)
    report, state = check_account(pruner, total), pruner.state_dict()
    assert report["neurons_removed"] > 0
    fresh, again, resumed, _ = attach_beside("GRU", neurons=True, target_sparsity=0.9)
    fresh.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(state)
    after = check_account(resumed, total)
    assert {key: after[key] for key in OF_THE_WHOLE} == {key: report[key] for key in OF_THE_WHOLE}
    pruner.detach()
    dynaprune.save(model, tmp_path / "model.safetensors")
    make, use, _ = KINDS["GRU"]
    loaded = Beside(make(), use)
    dynaprune.load(loaded, tmp_path / "model.safetensors")
    stored = sum(p.numel() for n, p in loaded.named_parameters() if not n.endswith("values"))
    kept = loaded.first.dense_shape().numel() + loaded.middle.dense_shape().numel()
    second = dynaprune.attach(loaded, adam(loaded), settings(neurons=True))
    found = check_account(second, stored + kept)
    assert found["parameters"]["live"] == report["parameters"]["live"]
    assert found["layers"]["other.weight_ih_l0"]["exempt"] == "torch's GRU has no block-sparse form"


def test_a_state_of_an_earlier_version_keeps_the_size_that_was_found_at_attach() -> None:
    model, optimizer, pruner, total = attach_beside("Bilinear")
    train(model, optimizer, 12)
    state = pruner.state_dict()
    del state["size_at_attach"]
    fresh, again, resumed, _ = attach_beside("Bilinear")
    fresh.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(state)
    check_account(resumed, total)


def test_an_end_before_the_target_names_both_figures() -> None:
    model, optimizer, pruner, _ = attach_beside("Embedding")
    train(model, optimizer, 9)
    said = f"{pruner.sparsity:.1%} \\({pruner.sparsity_of_model:.1%} of all parameters\\)"
    with pytest.warns(RuntimeWarning, match=f"ends at a sparsity of {said}, short of"):
        pruner.detach()


def test_a_model_without_layers_to_prune_names_its_experts_and_recurrent_layers() -> None:
    model = nn.Sequential(nn.LSTM(8, 8), Experts(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"1 layers of type torch's LSTM.*1 layers of type tests's Experts"):
        dynaprune.attach(model, adam(model), PruningConfig(block_size=8, total_steps=4))
