"""One attach line in the training loops people write: each gives what the plain loop gives, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from tests.pruning.attach_loops import assert_like_plain, assert_pruned, plain
from tests.pruning.attached import (
    BLOCKS,
    STEPS,
    adam,
    assert_equal,
    batch,
    dense_weights,
    loss_of,
    mlp,
    settings,
    sparse_layers,
    train,
)


def test_plain_loop_that_holds_its_last_loss() -> None:
    model = mlp()
    optimizer = adam(model)
    parameters, groups = list(model.parameters()), copy.copy(optimizer.param_groups)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    pruner = dynaprune.attach(model, optimizer, settings())
    losses: list[Tensor] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    assert_like_plain(model, pruner)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert optimizer.param_groups == groups
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    assert float(losses[-1].detach()) < float(losses[0].detach())


def test_without_compaction_the_weights_are_the_same_and_the_slots_stay() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(compact=False))
    train(model, optimizer)
    assert_equal(dense_weights(model), plain()[0])
    assert pruner.compactions == 0 and sum(layer.layout.capacity for layer in sparse_layers(model)) == BLOCKS


def test_weights_train_from_the_first_step() -> None:
    model, reference = mlp(), mlp()
    optimizer, plain_optimizer = adam(model), adam(reference)
    dynaprune.attach(model, optimizer, settings(start=0.3, interval=1))
    for step in range(5):
        for each, by in ((model, optimizer), (reference, plain_optimizer)):
            by.zero_grad()
            loss_of(each, step).backward()
            by.step()
    for found, expected in zip(dense_weights(model), dense_weights(reference), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradient_accumulation() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    optimizer.zero_grad()
    for part in range(2 * STEPS):
        (loss_of(model, part) / 2).backward()
        if part % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_like_plain(model, pruner, accumulate=2)


def test_clipping_by_a_cached_parameter_list() -> None:
    model = mlp()
    optimizer = adam(model)
    cached = [p for p in model.parameters() if p.requires_grad]
    pruner = dynaprune.attach(model, optimizer, settings())
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        norms.append(float(nn.utils.clip_grad_norm_(cached, 0.1)))
        optimizer.step()
    assert max(norms) > 0.1
    assert_like_plain(model, pruner, clip=0.1)


def test_zero_grad_that_keeps_the_tensors() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, step).backward()
        optimizer.step()
    assert_like_plain(model, pruner)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_step_with_a_closure(as_keyword: bool) -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert isinstance(loss, Tensor)
    assert_like_plain(model, pruner)


def test_two_optimizers() -> None:
    model = mlp()
    optimizers = [
        torch.optim.Adam([*model[0].parameters(), *model[4].parameters()], lr=1e-2),
        torch.optim.Adam(model[2].parameters(), lr=1e-2),
    ]
    pruner = dynaprune.attach(model, optimizers, settings())
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_like_plain(model, pruner)


def test_two_optimizers_of_which_one_steps_before_the_others_backward() -> None:
    """As in a GAN: a graph built before the first optimizer's step is used after it."""
    generator, critic = mlp(), nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 1))
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    optimizers = [torch.optim.SGD(generator.parameters(), 0.0), torch.optim.SGD(critic.parameters(), 0.0)]
    config = settings(include=["generator.0", "generator.2", "critic.2"])
    pruner = dynaprune.attach(both, optimizers, config)
    for step in range(STEPS):
        fake = generator(batch(step)[0])
        for optimizer in optimizers:
            optimizer.zero_grad()
        critic(fake.detach()).mean().backward()
        optimizers[1].step()
        critic(fake).mean().backward()
        optimizers[0].step()
    assert pruner.steps == STEPS and pruner.target_reached


def test_frozen_layers_are_exempt() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    assert type(model[0]) is nn.Linear and "frozen" in pruner.exempt["0"]
    train(model, optimizer)
    assert torch.equal(model[0].weight, before)
    assert pruner.sparsity == 0.75 and list(pruner.layers) == ["2"]


def test_tied_weights_are_exempt() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 32)
            self.hidden = nn.Linear(32, 32)
            self.decoder = nn.Linear(32, 16, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.decoder(self.hidden(self.embedding(tokens)))

    model = Tied()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(include=["hidden", "re:decode.*"]))
    assert list(pruner.layers) == ["hidden"] and "tied" in pruner.exempt["decoder"]
    tokens = torch.arange(16)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
    assert model.decoder.weight is model.embedding.weight
    assert pruner.target_reached


def test_attaching_in_the_middle_of_training_goes_on_where_it_was() -> None:
    model, reference = mlp(), mlp()
    optimizer, plain_optimizer = adam(model, amsgrad=True), adam(reference, amsgrad=True)
    train(model, optimizer, steps=4)
    train(reference, plain_optimizer, steps=4)
    dynaprune.attach(model, optimizer, settings(start=0.5, end=0.6, interval=1))
    for step in range(4, 10):
        for each, by in ((model, optimizer), (reference, plain_optimizer)):
            by.zero_grad()
            loss_of(each, step).backward()
            by.step()
    for found, expected in zip(dense_weights(model), dense_weights(reference), strict=True):
        torch.testing.assert_close(found, expected)


def test_schedulers_and_param_groups_are_untouched() -> None:
    model = mlp()
    groups = [
        {"params": [p for n, p in model.named_parameters() if "weight" in n], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if "bias" in n], "lr": 5e-3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer, after=scheduler.step)
    assert pruner.target_reached
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-2 * 0.9**STEPS, 5e-3 * 0.9**STEPS])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3]


def test_manual_steps_do_what_the_hooks_do() -> None:
    """What a loop of replayed CUDA graphs does: hooks do not run, ``pruner.step()`` is called instead.

    The gradient is read after the update then, which a score of gradients alone does not see.
    """
    model, hooked = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    by_hooks = torch.optim.SGD(hooked.parameters(), lr=0.1)
    pruner = dynaprune.attach(model, optimizer, settings(score="gradient"))
    dynaprune.attach(hooked, by_hooks, settings(score="gradient"))
    train(hooked, by_hooks)
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, step).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-0.1)
        pruner.step()
    assert_pruned(model, pruner)
    assert_equal(dense_weights(model), dense_weights(hooked))


def test_a_step_without_gradients_is_an_error() -> None:
    model = mlp()
    optimizer = adam(model)
    dynaprune.attach(model, optimizer, settings())
    with pytest.raises(RuntimeError, match=r"expected gradients on the prunable weights, got None"):
        optimizer.step()


def test_a_state_dict_of_another_structure_is_found_out() -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, steps=2)
    dense_state = copy.deepcopy(optimizer.state_dict())
    dynaprune.attach(model, optimizer, settings())
    train(model, optimizer, steps=2)
    optimizer.load_state_dict(dense_state)
    with pytest.raises(RuntimeError, match=r"Adam holds exp_avg of shape \(64, 32\) for 0.values, expected"):
        train(model, optimizer, steps=1)


def test_detach_stops_pruning_and_finalize_gives_plain_layers() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer, steps=8)
    sparsity = pruner.sparsity
    assert 0 < sparsity < 0.75
    pruner.detach()
    train(model, optimizer, steps=10)
    assert pruner.sparsity == sparsity and pruner.steps == 8
    parameters = [id(p) for p in model.parameters()]
    weights = dense_weights(model)
    assert pruner.finalize() is model and pruner.finalize() is model
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    assert_equal(dense_weights(model), weights)
    assert [id(p) for p in model.parameters()] == parameters
    train(model, optimizer, steps=2)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
