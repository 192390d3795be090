"""What attach refuses, by name and with the reason, and what it exempts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dynaprune
from tests.pruning.attached import BLOCKS, assert_equal, dense_weights, loss_of, mlp, settings


def refused(
    model: Any, optimizer: Any, reason: str, error: type[Exception] = ValueError, **options: Any
) -> None:
    """Attach raises with ``reason`` and leaves a module as it was."""
    is_module = isinstance(model, nn.Module)
    kinds = [type(m) for m in model.modules()] if is_module else []
    shapes = [shape_of(p) for p in model.parameters()] if is_module else []
    with pytest.raises(error, match=reason):
        dynaprune.attach(model, optimizer, options.pop("config", settings()), **options)
    if is_module:
        assert [type(m) for m in model.modules()] == kinds
        assert [shape_of(p) for p in model.parameters()] == shapes


def shape_of(parameter: Tensor) -> Any:
    return "lazy" if nn.parameter.is_lazy(parameter) else parameter.shape


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def test_lbfgs() -> None:
    model = mlp()
    refused(model, torch.optim.LBFGS(model.parameters()), "cannot attach to LBFGS: .*flattened")


def test_optimizers_that_need_matrices() -> None:
    model = mlp(bias=False)
    refused(model, torch.optim.Muon(model.parameters()), "cannot attach to Muon: .*2-D weights")

    class MyMuon(torch.optim.SGD):
        pass

    refused(model, MyMuon(model.parameters(), 0.1), "cannot attach to MyMuon: .*2-D weights")


def test_an_optimizer_whose_state_has_no_slice_per_block() -> None:
    model = mlp()
    refused(
        model, torch.optim.Adafactor(model.parameters()), "cannot attach to Adafactor: its state 'row_var'"
    )


def test_an_optimizer_whose_step_fails_on_blocks() -> None:
    class Matrices(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    rows, columns = p.shape
                    p.data.view(rows, columns)

    model = mlp(bias=False)
    reason = "cannot attach to Matrices: its step fails on a weight of shape .* .*too many values"
    refused(model, Matrices(model.parameters(), 0.1), reason)


def test_a_wrapper_with_state_of_its_own_is_not_looked_through() -> None:
    class Lookahead:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = mlp()
    reason = "expected a torch.optim.Optimizer or a list of them, got Lookahead"
    refused(model, Lookahead(sgd(model)), reason, TypeError)


def test_lightnings_wrapper_is_looked_through() -> None:
    model = mlp()
    optimizer = sgd(model)
    wrapper = type("LightningOptimizer", (), {"__module__": "lightning.pytorch.core", "optimizer": optimizer})
    assert dynaprune.attach(model, wrapper(), settings()).optimizers == [optimizer]


def test_deepspeed_by_optimizer_and_by_engine() -> None:
    model = mlp()
    wrapper = type(
        "DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero", "optimizer": sgd(model)}
    )
    refused(model, wrapper(), "cannot attach to DeepSpeedZeroOptimizer: DeepSpeed keeps")
    engine = type("DeepSpeedEngine", (nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})(mlp())
    refused(engine, sgd(engine), "cannot attach to DeepSpeedEngine: DeepSpeed keeps")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FullyShardedDataParallel", "FSDP keeps weights in flat shards"),
        ("FSDPModule", "FSDP keeps weights in flat shards"),
        ("DistributedDataParallel", "it is not torch's; in one process the model needs no such wrapper"),
        ("DataParallel", "its replicas"),
    ],
)
def test_wrappers_that_own_the_weights(name: str, reason: str) -> None:
    model = type(name, (nn.Sequential,), {})(mlp())
    refused(model, sgd(model), f"cannot attach to {name}: {reason}")


def test_more_than_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = mlp()
    refused(model, sgd(model), "cannot attach at world size 2")


def test_an_event_refuses_more_than_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = sgd(model)
    dynaprune.attach(model, optimizer, settings())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"cannot prune at world size 2: .*averaging without a word"):
        for step in range(12):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()


def test_optimizer_in_backward() -> None:
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    refused(model, list(optimizers.values()), "the weight of 0 has a hook that runs when .*in backward")


def test_stepping_inside_backward_is_an_error_when_it_happens() -> None:
    model = mlp()
    optimizer = sgd(model)
    dynaprune.attach(model, optimizer, settings())
    model[0].values.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(RuntimeError, match=r"SGD\.step was called inside backward"):
        loss_of(model, 0).backward()


def test_lazy_parameters() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.LazyLinear(32), nn.Linear(32, 4))
    refused(model, torch.optim.SGD(model[0].parameters(), 0.1), r"lazy parameters \(1.weight\)")


def test_a_model_without_weights() -> None:
    model = mlp().to("meta")
    refused(model, sgd(model), r"a model on the meta device \(0.weight\)")


def test_a_second_pruner_on_the_same_model() -> None:
    model = mlp()
    optimizer = sgd(model)
    first = dynaprune.attach(model, optimizer, settings())
    refused(model, optimizer, "without a pruner, got one attached to 0: detach it first")
    first.detach()
    assert dynaprune.attach(model, optimizer, settings()).structure.units == BLOCKS


def test_an_optimizer_without_prunable_weights() -> None:
    model = mlp()
    reason = (
        r"expected an optimizer that holds prunable weights of the model \(0, 2, 4, ...\), got SGD with none"
    )
    refused(model, torch.optim.SGD(mlp().parameters(), 0.1), reason)


def test_a_model_without_a_prunable_layer() -> None:
    model = nn.Sequential(nn.Embedding(8, 8), nn.ReLU())
    refused(model, sgd(model), "expected a model with at least one prunable layer, got none")
    bare = nn.Linear(32, 32)
    refused(bare, sgd(bare), "got a bare Linear: wrap it in nn.Sequential")


def test_things_of_the_wrong_type() -> None:
    model = mlp()
    refused([model], sgd(model), "expected the model as an nn.Module, got list", TypeError)
    refused(model, "adam", "expected a torch.optim.Optimizer or a list of them, got str", TypeError)
    refused(model, [], "at least one optimizer, got an empty list")
    optimizer = sgd(model)
    refused(model, [optimizer, optimizer], "each optimizer once, got the same SGD twice")
    refused(model, optimizer, "expected a PruningConfig, got dict", TypeError, config={"block_size": 8})
    refused(model, optimizer, "expected the trial as a callable", TypeError, trial=[1.0])
    refused(model, optimizer, "self-paced pruning", config=settings(target_sparsity=None))
    refused(model, optimizer, "expected total_steps", config=settings(total_steps=None))
    regrowing = settings(target_sparsity=None, total_steps=None, regrow=0.3)
    refused(model, optimizer, "total_steps beside regrow", config=regrowing)
    refused(model, optimizer, "a pattern that matches a module", config=settings(include=["nowhere"]))


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"threshold": 0.0}, ValueError, "threshold in (0, 1), got 0.0"),
        ({"threshold": 1}, ValueError, "threshold in (0, 1), got 1"),
        ({"threshold": "0.01"}, TypeError, "threshold to be a number, got '0.01'"),
        ({"target_sparsity": 1.0}, ValueError, "target_sparsity in (0, 1), got 1.0"),
        ({"target_sparsity": -0.1}, ValueError, "target_sparsity in (0, 1), got -0.1"),
        ({"total_steps": 0}, ValueError, "total_steps of at least 1, got 0"),
        ({"total_steps": 10.0}, TypeError, "total_steps to be a whole number, got 10.0"),
        ({"block_size": 7}, ValueError, "7"),
        ({"block_size": 256}, ValueError, "256"),
        ({"block_size": "8"}, TypeError, "'8'"),
        ({"start": 0.5, "end": 0.4}, ValueError, "start 0.5 and end 0.4"),
        ({"end": 0.9}, ValueError, "end 0.9"),
        ({"interval": 0}, ValueError, "interval of at least 1, got 0"),
        ({"score": "luck"}, ValueError, "score to be one of"),
        ({"score_decay": 1.0}, ValueError, "score_decay in [0, 1), got 1.0"),
        ({"allocation": "fair"}, ValueError, "global, uniform, erk, got 'fair'"),
        ({"cost": "time"}, ValueError, "parameters, flops, got 'time'"),
        ({"floor": 1.0}, ValueError, "floor in [0, 1), got 1.0"),
        ({"floors": {"0": 2.0}}, ValueError, "floors['0'] in [0, 1], got 2.0"),
        ({"floors": [0.5]}, TypeError, "floors as a mapping"),
        ({"tolerance": -1.0}, ValueError, "tolerance of at least 0, got -1.0"),
        ({"allowance": float("nan")}, ValueError, "a finite allowance, got nan"),
        ({"classes": 1}, ValueError, "classes of at least 2, got 1"),
        ({"rungs": 0}, ValueError, "rungs of at least 1, got 0"),
        ({"regrow": 1.5}, ValueError, "regrow in [0, 1), got 1.5"),
        ({"neurons": 1}, TypeError, "neurons to be True or False, got 1"),
        ({"types": ["lstm"]}, ValueError, "types to be one of linear, conv2d, conv1d, got 'lstm'"),
        ({"types": []}, ValueError, "at least one of linear, conv2d, conv1d"),
        ({"include": "layer"}, TypeError, "include as a sequence of strings, got 'layer'"),
        ({"exclude": [3]}, TypeError, "exclude as a sequence of strings, got [3]"),
        ({"seed": -1}, ValueError, "seed of at least 0, got -1"),
        ({"observe_every": 0}, ValueError, "observe_every of at least 1, got 0"),
        ({"self_paced_share": 1.0}, ValueError, "self_paced_share in (0, 1), got 1.0"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)):
        settings(**wrong)


def test_a_floor_for_a_layer_that_is_not_pruned() -> None:
    model = mlp()
    reason = r"expected floors of pruned layers \(0, 2\), got one of '4'"
    refused(model, sgd(model), reason, config=settings(floors={"4": 0.5}))


def test_a_layer_asked_for_that_cannot_be_pruned_leaves_the_others_dense() -> None:
    model = mlp()
    parametrizations.weight_norm(model[2])
    reason = "layer '2' was asked for by name .*parametrized"
    refused(model, sgd(model), reason, config=settings(include=["0", "2"]))


def test_exempt_layers_have_a_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free = nn.Linear(32, 32)
            self.normed = parametrizations.weight_norm(nn.Linear(32, 32))
            self.attention = nn.MultiheadAttention(32, 2)
            self.odd = nn.Linear(32, 9)
            self.other = nn.Linear(32, 32)
            self.classifier = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.normed(self.free(x))
            return self.classifier(self.other(self.attention(x, x, x, need_weights=False)[0]))

    model = Mixed()
    mine = [p for n, p in model.named_parameters() if not n.startswith("other")]
    pruner = dynaprune.attach(model, torch.optim.SGD(mine, 0.1), settings())
    assert list(pruner.layers) == ["free"]
    reasons = {name: layer["exempt"] for name, layer in pruner.report()["layers"].items()}
    for name, said in {
        "normed": "parametrized",
        "attention.out_proj": "read by MultiheadAttention",
        "odd": "padding",
        "other": "no optimizer given holds its weight",
        "classifier": "the classifier",
        "free": "",
    }.items():
        assert said in reasons[name]
        assert bool(reasons[name]) == (name != "free")


def test_a_dry_step_leaves_no_trace() -> None:
    class Noisy(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            torch.rand(3)
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    model = mlp()
    optimizer = Noisy(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss_of(model, 0).backward()
    optimizer.step()
    weights, random = dense_weights(model), torch.get_rng_state()
    state = {k: v.clone() for k, v in optimizer.state[model[4].weight].items()}
    dynaprune.attach(model, optimizer, settings())
    assert optimizer.calls == 1 and scheduler.last_epoch == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert_equal(dense_weights(model), weights)
    assert all(torch.equal(optimizer.state[model[4].weight][k], v) for k, v in state.items())
    assert len(optimizer.state) == 6
