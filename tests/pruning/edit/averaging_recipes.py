"""How people average weights: the loops of well-known libraries, and hand-written ones, in a common form."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

DECAY = 0.8


class Recipe:
    """One way to average: ``make`` it, let ``followed()`` follow, ``update`` after each step.

    ``update`` returns the share of the old average that stays, 0 where the weights are copied. ``tensors``
    gives the average of every parameter by its name in the model.
    """

    averages_buffers = False

    def __init__(self, model: nn.Module) -> None:
        self.updates = 0

    def followed(self) -> list[Any]:
        raise NotImplementedError

    def update(self, model: nn.Module) -> float:
        raise NotImplementedError

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        raise NotImplementedError


class _Module(Recipe):
    """The average is a deep copy of the model."""

    copy: nn.Module

    def followed(self) -> list[Any]:
        return [self.copy]

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(self.copy.named_parameters())


def averaged_model(equal: bool = False, **options: Any) -> Callable[[nn.Module], Recipe]:
    """torch.optim.swa_utils.AveragedModel."""

    class Averaged(_Module):
        averages_buffers = bool(options.get("use_buffers"))

        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.average = swa_utils.AveragedModel(model, **options)
            self.copy = self.average.module

        def followed(self) -> list[Any]:
            return [self.average]

        def update(self, model: nn.Module) -> float:
            n = int(self.average.n_averaged)
            self.average.update_parameters(model)
            return 0 if n == 0 else n / (n + 1) if equal else DECAY

    return Averaged


class TimmV2(_Module):
    """timm.utils.ModelEmaV2: zips state dict values, copies into each, integers too."""

    averages_buffers = True

    class Ema(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.module = copy.deepcopy(model)
            self.module.eval()

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.ema = self.Ema(model)
        self.copy = self.ema.module

    def followed(self) -> list[Any]:
        return [self.ema]

    def update(self, model: nn.Module) -> float:
        with torch.no_grad():
            pairs = zip(self.ema.module.state_dict().values(), model.state_dict().values(), strict=True)
            for average, value in pairs:
                average.copy_(DECAY * average + (1.0 - DECAY) * value)
        return DECAY


def timm_v3(foreach: bool) -> Callable[[nn.Module], Recipe]:
    """timm.utils.ModelEmaV3: floats are lerped, one by one or all at once, everything else is copied."""

    class TimmV3(TimmV2):
        @torch.no_grad()
        def update(self, model: nn.Module) -> float:
            averages: list[Tensor] = []
            values: list[Tensor] = []
            pairs = zip(self.ema.module.state_dict().values(), model.state_dict().values(), strict=True)
            for average, value in pairs:
                if not average.is_floating_point():
                    average.copy_(value)
                elif foreach:
                    averages.append(average)
                    values.append(value)
                else:
                    average.lerp_(value, weight=1.0 - DECAY)
            if foreach:
                torch._foreach_lerp_(averages, values, weight=1.0 - DECAY)
            return DECAY

    return TimmV3


class Ultralytics(_Module):
    """ultralytics.utils.torch_utils.ModelEMA: a decay that ramps up, in place on a state dict's floats."""

    averages_buffers = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.copy = copy.deepcopy(model).eval()
        for parameter in self.copy.parameters():
            parameter.requires_grad_(False)

    def update(self, model: nn.Module) -> float:
        self.updates += 1
        decay = DECAY * (1 - math.exp(-self.updates / 5))
        state = model.state_dict()
        for name, value in self.copy.state_dict().items():
            if value.dtype.is_floating_point:
                value *= decay
                value += (1 - decay) * state[name].detach()
        return decay


class OverParameters(_Module):
    """By hand, over both models' parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.copy = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> float:
        for average, value in zip(self.copy.parameters(), model.parameters(), strict=True):
            average.lerp_(value, 1 - DECAY)
        return DECAY


class OverData(OverParameters):
    """By hand, through ``.data``, which moves no version."""

    def update(self, model: nn.Module) -> float:
        for average, value in zip(self.copy.parameters(), model.parameters(), strict=True):
            average.data.mul_(DECAY).add_(value.data, alpha=1 - DECAY)
        return DECAY


class NewData(OverParameters):
    """By hand, with new tensors as ``.data``."""

    def update(self, model: nn.Module) -> float:
        theirs = dict(model.named_parameters())
        for name, average in self.copy.named_parameters():
            average.data = DECAY * average.data + (1 - DECAY) * theirs[name].data
        return DECAY


class LoadedStateDict(OverParameters):
    """By hand: a new state dict of averages, integers too, that the copy loads at each step."""

    averages_buffers = True

    def update(self, model: nn.Module) -> float:
        theirs, mine = model.state_dict(), self.copy.state_dict()
        self.copy.load_state_dict({k: DECAY * mine[k] + (1 - DECAY) * theirs[k] for k in mine})
        return DECAY


class _Tensors(Recipe):
    """The average is a container of tensors."""

    of_tensors = True
    shadow: Any

    def followed(self) -> list[Any]:
        return [self.shadow]

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: self.shadow[name] for name, _ in model.named_parameters()}


class DictOfParameters(_Tensors):
    """A dict by name, in which every update puts new tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shadow = {name: p.data.clone() for name, p in model.named_parameters() if p.requires_grad}

    def update(self, model: nn.Module) -> float:
        for name, parameter in model.named_parameters():
            self.shadow[name] = ((1.0 - DECAY) * parameter.data + DECAY * self.shadow[name]).clone()
        return DECAY


class DictInPlace(DictOfParameters):
    """A dict by name whose tensors are written in place."""

    def update(self, model: nn.Module) -> float:
        for name, parameter in model.named_parameters():
            self.shadow[name].mul_(DECAY).add_(parameter.detach(), alpha=1 - DECAY)
        return DECAY


class DictInDouble(DictOfParameters):
    """A dict in float64 of a model in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shadow = {name: tensor.double() for name, tensor in self.shadow.items()}


class DictInInferenceMode(DictOfParameters):
    """A dict of tensors that are made in inference mode."""

    @torch.inference_mode()
    def update(self, model: nn.Module) -> float:
        return super().update(model)


class DictByParameter(_Tensors):
    """A dict by the Parameter objects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shadow = {p: p.detach().clone() for p in model.parameters()}

    def update(self, model: nn.Module) -> float:
        for parameter, average in self.shadow.items():
            average.lerp_(parameter.detach(), 1 - DECAY)
        return DECAY

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: self.shadow[p] for name, p in model.named_parameters()}


class DictOfState(_Tensors):
    """A state dict whose every value is averaged, integers too."""

    averages_buffers = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shadow = {name: value.clone() for name, value in model.state_dict().items()}

    def update(self, model: nn.Module) -> float:
        for name, value in model.state_dict().items():
            self.shadow[name] = DECAY * self.shadow[name] + (1 - DECAY) * value
        return DECAY


class DictOfStateInPlace(DictOfState):
    """A state dict into whose every value its average is copied; integers are cut to what lies below."""

    def update(self, model: nn.Module) -> float:
        for name, value in model.state_dict().items():
            self.shadow[name].copy_(0.9 * self.shadow[name] + (1 - 0.9) * value)
        return 0.9


class DictOfStateFloats(DictOfState):
    """A deep-copied state dict whose floating point values are averaged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shadow = copy.deepcopy(model.state_dict())

    def update(self, model: nn.Module) -> float:
        for name, value in model.state_dict().items():
            if self.shadow[name].is_floating_point():
                self.shadow[name].lerp_(value, 1 - DECAY)
        return DECAY


class ListOfParameters(_Tensors):
    """torch_ema and diffusers' EMAModel: a list in the order of the parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shadow = [p.clone().detach() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> float:
        for average, parameter in zip(self.shadow, model.parameters(), strict=True):
            average.sub_((1 - DECAY) * (average - parameter))
        return DECAY

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(zip((name for name, _ in model.named_parameters()), self.shadow, strict=True))


class TupleOfState(ListOfParameters):
    """A tuple in the order of the state dict, averaged all at once."""

    averages_buffers = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shadow = tuple(value.clone() for value in model.state_dict().values())

    @torch.no_grad()
    def update(self, model: nn.Module) -> float:
        pairs = zip(self.shadow, model.state_dict().values(), strict=True)
        floats = [(a, v) for a, v in pairs if a.is_floating_point()]
        torch._foreach_mul_([a for a, _ in floats], DECAY)
        torch._foreach_add_([a for a, _ in floats], [v for _, v in floats], alpha=1 - DECAY)
        return DECAY

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        by_name = dict(zip(model.state_dict(), self.shadow, strict=True))
        return {name: by_name[name] for name, _ in model.named_parameters()}


class FlatBuffers(_Tensors):
    """LitEma of latent diffusion: a module with a buffer for each parameter, under a name without dots."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.holder = nn.Module()
        self.flat = {name: name.replace(".", "") for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            self.holder.register_buffer(self.flat[name], parameter.clone().detach())

    def followed(self) -> list[Any]:
        buffers = dict(self.holder.named_buffers())
        return [{name: buffers[flat] for name, flat in self.flat.items()}]

    @torch.no_grad()
    def update(self, model: nn.Module) -> float:
        buffers = dict(self.holder.named_buffers())
        for name, parameter in model.named_parameters():
            average = buffers[self.flat[name]]
            average.sub_((1.0 - DECAY) * (average - parameter))
        return DECAY

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        buffers = dict(self.holder.named_buffers())
        return {name: buffers[flat] for name, flat in self.flat.items()}


def ema_pytorch(**options: Any) -> Callable[[nn.Module], Recipe]:
    """The library ema-pytorch."""

    class EmaPytorch(_Module):
        averages_buffers = True

        def __init__(self, model: nn.Module) -> None:
            from ema_pytorch import EMA

            super().__init__(model)
            self.ema = EMA(model, beta=DECAY, min_value=DECAY, update_after_step=3, update_every=1, **options)
            self.copy = self.ema.ema_model

        def followed(self) -> list[Any]:
            return [self.ema]

        def update(self, model: nn.Module) -> float:
            copied = not self.ema.initted or int(self.ema.step) <= 3
            self.ema.update()
            return 0.0 if copied else self.ema.get_current_decay()

    return EmaPytorch


RECIPES: dict[str, Callable[[nn.Module], Recipe]] = {
    "AveragedModel": averaged_model(equal=True),
    "AveragedModel, buffers": averaged_model(equal=True, use_buffers=True),
    "AveragedModel, SWA": averaged_model(equal=True, multi_avg_fn=swa_utils.get_swa_multi_avg_fn()),
    "AveragedModel, EMA": averaged_model(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY)),
    "AveragedModel, EMA, buffers": averaged_model(
        multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY), use_buffers=True
    ),
    "AveragedModel, EMA one by one": averaged_model(avg_fn=swa_utils.get_ema_avg_fn(DECAY), use_buffers=True),
    "timm V2": TimmV2,
    "timm V3": timm_v3(foreach=False),
    "timm V3, foreach": timm_v3(foreach=True),
    "ultralytics": Ultralytics,
    "parameters": OverParameters,
    "data": OverData,
    "new data": NewData,
    "loaded state dict": LoadedStateDict,
    "dict": DictOfParameters,
    "dict in place": DictInPlace,
    "dict in float64": DictInDouble,
    "dict in inference mode": DictInInferenceMode,
    "dict by Parameter": DictByParameter,
    "dict of a state": DictOfState,
    "dict of a state in place": DictOfStateInPlace,
    "dict of a state's floats": DictOfStateFloats,
    "list": ListOfParameters,
    "tuple of a state": TupleOfState,
    "flat buffers": FlatBuffers,
    "ema-pytorch": ema_pytorch(),
    "ema-pytorch, foreach": ema_pytorch(use_foreach=True),
}
