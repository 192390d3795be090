"""Multi-head attention, recognised by its parts, so that its counts of heads follow when heads are cut.

transformers 5 has no head pruning, but its attention modules take the number of heads from the width of
their projections (``view(..., -1, head_size)``). A head is then a span of outputs of the query, key and value
layers and of inputs of the output layer, and cutting these four is all it takes; the counts that the module
keeps beside them (``num_attention_heads``, ``all_head_size``) are set to what is left.

A head can go without changing what the model computes where its columns of the output layer are dead, or its
value rows are: attention weights sum to one, so the head is then its value bias at every position, which
moves into the output layer's bias. (Dropout of attention weights, where a model has it, makes that true on
average only.) Dead query or key rows are no reason: such a head still averages its values.

Which outputs make a head is found by following a forward pass (``dependency_graph``), in any attention. Here
are those that keep counts of their own. Where code knows the number of heads by heart (timm), the cut fails
its check, and the heads stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dynaprune.nn import BlockSparseLinear

__all__ = ["Attention", "find_attentions"]

# Projections, and the attributes that hold the number and the size of the heads: BERT and its like; Wav2Vec2,
# BART and theirs. The output layer is `out_proj` beside them, or `output.dense` beside the module.
_KINDS = (
    (("query", "key", "value"), "num_attention_heads", "attention_head_size"),
    (("q_proj", "k_proj", "v_proj"), "num_heads", "head_dim"),
)
_TOTAL_WIDTH = "all_head_size"


@dataclass(frozen=True)
class Attention:
    """One attention module of a model, by the names of its layers.

    Args:
        name: of the module. heads, head_size: as they were when it was found.
        count_attribute: where the module keeps its number of heads.
    """

    name: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    head_size: int
    count_attribute: str

    def set_counts(self, model: nn.Module, assign: Callable[[Any, str, Any], None] = setattr) -> None:
        """Bring the module's own counts in line with the width that its layers have now.

        Args:
            assign: ``assign(module, attribute, value)``; the surgery's, where a cut may be taken back.
        """
        module: Any = model.get_submodule(self.name)
        width = _outputs(model.get_submodule(self.value))
        if width == getattr(module, self.count_attribute) * self.head_size:
            return
        assign(module, self.count_attribute, width // self.head_size)
        if hasattr(module, _TOTAL_WIDTH):
            assign(module, _TOTAL_WIDTH, width)


def find_attentions(model: nn.Module) -> list[Attention]:
    """Every attention module whose parts are known and whose widths are all heads times head size."""
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        for projections, count_attribute, size_attribute in _KINDS:
            heads, size = getattr(module, count_attribute, None), getattr(module, size_attribute, None)
            if type(heads) is not int or type(size) is not int or heads < 1 or size < 1:
                continue
            prefix = f"{name}." if name else ""
            query, key, value = names = [prefix + each for each in projections]
            output = next((n for n in _output_names(name, prefix) if _is_linear(modules.get(n))), None)
            if output is None or not all(_is_linear(modules.get(each)) for each in names):
                continue
            widths = [_outputs(modules[each]) for each in names] + [_inputs(modules[output])]
            if all(width == heads * size for width in widths):
                found.append(Attention(name, query, key, value, output, heads, size, count_attribute))
    return found


def _output_names(name: str, prefix: str) -> list[str]:
    beside = name.rpartition(".")[0]
    return [f"{prefix}out_proj", f"{beside}.output.dense" if beside else "output.dense"]


def _is_linear(module: Any) -> bool:
    return type(module) in (nn.Linear, BlockSparseLinear)


def _outputs(module: Any) -> int:
    return int(module.out_features)


def _inputs(module: Any) -> int:
    return int(module.in_features)
