"""Follow one forward pass and find which outputs and inputs of which layers depend on each other.

Every layer's outputs are channels of their own; each operation carries them on (``channel_rules``), and what
reads or meets them joins their set (``channel_sets``). The work is proportional to the operations of one
forward pass and to the elements of one sample or token, whatever loops the model's graph has.

Why not through an existing dependency graph: those follow index lists backwards through slices,
concatenations and reshapes again and again until nothing changes, which for rotary embeddings never happens.
"""

from __future__ import annotations

import torch
from torch import nn

from dynaprune.neurons.channel_sets import ChannelSets
from dynaprune.neurons.channel_tracer import ChannelTracer, DependencyGraph, Layer
from dynaprune.neurons.example_inputs import ExampleInputs, tensors_in
from dynaprune.neurons.surgery import is_channelwise
from dynaprune.nn.calibration_mode import calibration_mode
from dynaprune.nn.shape import layer_shape

__all__ = ["DependencyGraph", "Layer", "trace"]


def trace(model: nn.Module, example: ExampleInputs) -> DependencyGraph:
    """Run ``model`` once, in evaluation mode, and follow the channels of its layers.

    Where that reaches not every layer of a model that trains (an auxiliary head), once more in training mode.
    Weights, gradients, buffers, modes and random states stay as they were.
    """
    layers = _layers_of(model)
    sets = ChannelSets(sum(len(x.outputs) + len(x.inputs) for x in layers.values()))
    graph = DependencyGraph(layers, sets)
    tracer = ChannelTracer(graph, model)
    _run(tracer, model, example, training=False)
    if model.training and not all(layer.called for layer in layers.values()):
        try:
            _run(tracer, model, example, training=True)
        except Exception as error:
            graph.unknown["the forward pass in training mode"] = f"{type(error).__name__}: {str(error)[:200]}"
    return graph


def _run(tracer: ChannelTracer, model: nn.Module, example: ExampleInputs, *, training: bool) -> None:
    flags = {module: module.training for module in model.modules()}
    # grad mode keeps nn.TransformerEncoderLayer off its fused path
    with calibration_mode(model), torch.enable_grad():
        for module, flag in flags.items():
            module.training = flag and training
        with tracer.watching():
            outputs = example.forward(model)
    for tensor in tensors_in(outputs):
        tracer.sets.block(tracer.storage.read(tensor).values, "its outputs are outputs of the model")


def _layers_of(model: nn.Module) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    start = 0
    for name, module in model.named_modules():
        shape = layer_shape(module)
        if shape is None or "forward" in vars(module):
            continue
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            continue
        channelwise = is_channelwise(module)
        outputs = torch.arange(start, start + shape.out)
        start += shape.out
        inputs = torch.arange(start, start + (0 if channelwise else shape.in_))
        start += len(inputs)
        layers[name] = Layer(name, module, channelwise, outputs, inputs)
    return layers
