import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from dynaprune.nn.calibration_mode import calibration_mode
from dynaprune.pruning.decide.calibration import CalibrationTrial
from tests.rounding import agree


class Masked(nn.Linear):
    """Stands for a block-sparse layer: the pruner suspends by flipping the mask in place, and flips it
    back."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.ones(outputs, dtype=torch.bool))

    def forward(self, x):
        return super().forward(x) * self.mask


class Restless(nn.Module):
    """Changes and draws whatever it can in any mode: a counter buffer, a replaced buffer, every random
    state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.full((3,), float("nan")))
        self.register_buffer("hidden", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls += 1
        self.last = x.detach()[0, :3].clone()
        self.hidden.data.add_(1)
        noise = random.random() + float(np.random.rand())
        return F.dropout(x, 0.1) + 1e-3 * noise + 1e-3 * torch.rand(())


class Functional(nn.Module):
    """Dropout by function, switched by the module's flag."""

    def forward(self, x):
        return F.dropout(x, 0.5, training=self.training)


def build():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Dropout2d(0.3),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.ReLU(),
        nn.BatchNorm2d(8, momentum=None),
        nn.Flatten(),
        spectral_norm(nn.Linear(8 * 36, 32)),
        nn.BatchNorm1d(32, track_running_stats=False),
        nn.AlphaDropout(0.2),
        Masked(32, 32),
        Restless(),
        Functional(),
        nn.Dropout(0.5),
        nn.Linear(32, 10),
    )


def dataset(n=96):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 1, 6, 6, generator=generator)
    return torch.utils.data.TensorDataset(images, torch.arange(n) % 10)


def losses(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none"), labels


def bits(value):
    """Everything reachable in nested containers, as bytes."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value


def everything(model, optimizer):
    return bits(
        {
            "model": model.state_dict(),
            "gradients": [p.grad for p in model.parameters()],
            "optimizer": optimizer.state_dict(),
            "flags": [m.training for m in model.modules()],
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
        }
    )


def train(trial_at=(), steps=6, before_step=False):
    """`steps` of fused Adam; at the steps named, an event of three trials with a set suspended in the second.

    Between backward and step (`before_step`), or after the step, where the pruner's hook runs.
    """
    model = build()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    trial = CalibrationTrial(model, dataset(), losses, samples=64, batch_size=24, seed=11)
    model.train()
    model[4].eval()
    states = []

    def event():
        before = everything(model, optimizer)
        trial.redraw()
        base, _ = trial()
        mask = model[11].mask
        kept = mask.clone()
        mask[:8] = False
        suspended, _ = trial()
        mask.copy_(kept)
        again, _ = trial()
        assert everything(model, optimizer) == before
        assert torch.equal(base, again)
        assert not torch.equal(base, suspended)

    for step in range(steps):
        images, labels = dataset()[torch.randint(96, (32,)).tolist()]
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if step in trial_at and before_step:
            event()
        optimizer.step()
        if step in trial_at and not before_step:
            event()
        states.append((loss.item(), everything(model, optimizer)))
    return states


@pytest.mark.parametrize("before_step", [False, True])
def test_a_trial_changes_nothing_and_the_next_steps_are_the_same_to_the_bit(before_step):
    undisturbed, disturbed = train(), train(trial_at=(1, 2, 4), before_step=before_step)
    assert undisturbed == disturbed


def test_a_graph_held_over_a_trial_still_runs_backward():
    def gradients(trial):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), Masked(8, 10)).train()
        images, labels = dataset()[:]
        loss = F.cross_entropy(model(images.flatten(1)), labels)
        if trial:
            with calibration_mode(model):
                model(images.flatten(1) * 3)
        loss.backward()
        return bits([p.grad for p in model.parameters()] + list(model.buffers()))

    assert gradients(trial=False) == gradients(trial=True)


def test_buffers_keep_identity_and_norm_layers_even_their_version():
    model = build().train()
    held = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
    with calibration_mode(model):
        model(dataset()[:][0])
        assert model[1].running_mean is not held["1.running_mean"][0]
        assert int(model[12].calls) == 1
    after = dict(model.named_buffers())
    assert list(after) == list(held)
    for name, (buffer, version) in held.items():
        assert after[name] is buffer
        if "running" in name or "num_batches" in name or "mask" in name:
            assert buffer._version == version, name


def test_norm_layers_use_batch_statistics_and_dropout_is_off():
    model = build().train()
    images = dataset()[:][0]
    expected = copy.deepcopy(model[:2]).train()(images)
    with calibration_mode(model):
        assert agree(model[:2](images), expected)
        first = model[:2](images)
        assert torch.equal(model[2](first), first)
        features = torch.ones(4, 32)
        for index in (10, 13, 14):
            assert torch.equal(model[index](features), features)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_running_statistics_of_another_distribution_do_not_count():
    norm = nn.BatchNorm1d(4)
    norm.running_mean.fill_(100.0)
    x = torch.randn(64, 4)
    with calibration_mode(norm.train()):
        assert norm(x).mean().abs() < 1e-5
    with calibration_mode(norm.eval()):
        assert norm(x).mean().abs() < 1e-5
    assert bool((norm.running_mean == 100.0).all()) and not norm.training


def test_a_norm_layer_the_user_froze_keeps_its_running_statistics():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)).train()
    model[0].eval()
    model[0].running_mean.fill_(5.0)
    x = torch.randn(64, 4)
    expected = model[0](x)
    with calibration_mode(model):
        assert torch.equal(model[0](x), expected)
        assert [m.training for m in model.modules()] == [False, False, True]
    assert [m.training for m in model.modules()] == [True, False, True]


def test_a_nested_call_leaves_the_modes_to_the_outer_one():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[0].eval()
    with calibration_mode(model):
        with calibration_mode(model):
            inside = [m.training for m in model.modules()]
        assert inside == [m.training for m in model.modules()] == [False, False, True, False]
    assert [m.training for m in model.modules()] == [True, False, True, True]


def test_everything_is_put_back_after_an_error():
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="in the middle"), calibration_mode(model, seed=1):
        model(dataset()[:][0])
        model.register_buffer("added", torch.ones(1))
        del model[11].mask
        raise RuntimeError("in the middle")
    assert everything(model, optimizer) == before
    assert torch.is_grad_enabled() and torch.is_autocast_cache_enabled()


def test_a_buffer_shared_by_two_modules_stays_shared():
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other._buffers["running_mean"] = one.running_mean
    model = nn.ModuleList([one, other]).train()
    with calibration_mode(model):
        assert one.running_mean is other.running_mean
        one(torch.randn(8, 3))
        assert torch.equal(one.running_mean, other.running_mean)
    assert one.running_mean is other.running_mean
    assert bool((one.running_mean == 0).all())


def test_random_draws_inside_are_the_same_in_every_evaluation_and_cost_none_outside():
    model = nn.Linear(1, 1)
    drawn = []
    outside = (random.getstate(), bits(np.random.get_state()), bits(torch.get_rng_state()))
    for _ in range(2):
        with calibration_mode(model, seed=4):
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
    assert outside == (random.getstate(), bits(np.random.get_state()), bits(torch.get_rng_state()))


@pytest.mark.gpu
def test_random_state_and_buffers_of_a_gpu_are_put_back():
    model = build().cuda().train()
    trial = CalibrationTrial(model, dataset(), losses, samples=64, batch_size=24)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.cuda.get_rng_state()
    first, second = trial()[0], trial()[0]
    assert first.is_cuda and torch.equal(first, second)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for name, buffer in model.named_buffers():
        assert torch.equal(torch.nan_to_num(buffer), torch.nan_to_num(buffers[name])), name


def test_autocast_stays_on_and_no_cast_from_before_the_weights_changed_is_evaluated():
    model = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().sum()
        with torch.no_grad():
            model.weight.zero_()
        with calibration_mode(model):
            assert torch.is_autocast_enabled("cpu")
            output = model(x)
            assert output.dtype == torch.bfloat16
            assert torch.equal(output, model.bias.bfloat16().expand(4, 8))
        assert torch.is_autocast_cache_enabled()
        (loss + model(x).float().sum()).backward()
    assert bool(model.weight.grad.any())


def test_calls_of_one_event_see_the_same_samples_and_redraw_draws_others():
    seen = []

    def record(model, batch):
        seen.append(batch[1].clone())
        return model(batch[0].flatten(1)).mean(1), batch[1]

    data = torch.utils.data.TensorDataset(dataset()[:][0], torch.arange(96))
    for cache in (True, False):
        seen.clear()
        trial = CalibrationTrial(
            nn.Linear(36, 2), data, record, samples=50, batch_size=20, seed=3, cache=cache
        )
        first, labels = trial()
        assert torch.equal(first, trial()[0])
        assert first.dtype == torch.float64 and labels.dtype == torch.int64
        assert [len(part) for part in seen] == [17, 17, 16] * 2
        assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:])) and torch.equal(
            torch.cat(seen[:3]), labels
        )
        assert labels.unique().numel() == 50
        trial.redraw()
        assert not torch.equal(trial()[1], labels)


def test_sampling_depends_on_the_seed_alone_and_resumes():
    def trial(seed):
        return CalibrationTrial(
            nn.Linear(36, 10), dataset(), lambda m, b: losses(lambda x: m(x.flatten(1)), b), 32, seed=seed
        )

    torch.manual_seed(0)
    one, two, other = trial(1), trial(1), trial(2)
    two.model = other.model = one.model
    for each in (one, two, other):
        torch.rand(7)
        each.redraw()
    assert torch.equal(one()[0], two()[0]) and not torch.equal(one()[0], other()[0])
    resumed = trial(1)
    resumed.model = one.model
    resumed.load_state_dict(one.state_dict())
    assert torch.equal(resumed()[0], one()[0])
    for each in (one, resumed):
        each.redraw()
    assert torch.equal(resumed()[0], one()[0])
    with pytest.raises(ValueError, match=r"keys \['draws', 'seed'\], got \['seed'\]"):
        resumed.load_state_dict({"seed": 1})


def test_a_small_data_set_is_used_whole():
    trial = CalibrationTrial(build(), dataset(40), losses)
    assert trial.samples == 40
    found, labels = trial()
    assert found.shape == labels.shape == (40,)


def test_a_loss_by_mapping_without_classes():
    items = [{"x": torch.full((4,), float(i)), "name": str(i)} for i in range(20)]
    trial = CalibrationTrial(nn.Linear(4, 1), items, lambda m, b: m(b["x"]).squeeze(1).abs(), batch_size=8)
    found, labels = trial()
    assert found.shape == (20,) and labels is None


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b[0]).mean(), r"one floating-point loss per independent sample.*shape \(\)"),
        (lambda m, b: m(b[0]), r"shape \(40,\).*got torch.float32 of shape \(40, 10\)"),
        (lambda m, b: b[1], "got torch.int64"),
        (lambda m, b: 1.0, "got float"),
        (lambda m, b: (m(b[0]).mean(1), b[1][:3]), r"one integer class per sample.*\(3,\)"),
        (lambda m, b: (m(b[0]).mean(1), b[1].float()), "one integer class per sample.*torch.float32"),
    ],
)
def test_a_loss_of_the_wrong_kind_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        CalibrationTrial(build(), dataset(40), loss)()


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"nn.Module, got function"):
        CalibrationTrial(losses, dataset(), losses)
    with pytest.raises(TypeError, match=r"map-style data set.*got generator"):
        CalibrationTrial(build(), (x for x in ()), losses)
    with pytest.raises(TypeError, match=r"callable loss.*got Tensor"):
        CalibrationTrial(build(), dataset(), torch.ones(1))
    for arguments in ({"samples": 4}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=r"at least 8.*got 96"):
            CalibrationTrial(build(), dataset(), losses, **arguments)
    with pytest.raises(ValueError, match="seed in"):
        CalibrationTrial(build(), dataset(), losses, seed=-1)
