"""Refuse code under ``torch.compile`` that changes the dense weight of a block-sparse layer in place.

A compiled function reads the dense weight as a tensor computed from ``values``; a change of it would be lost.
While the function is traced, its graph is looked through for such changes.
"""

from __future__ import annotations

import operator
from typing import Any

_IN_PLACE = {
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
}


def refuse_writes(context: Any) -> None:
    """For ``torch._dynamo.comptime``: check, once its graph is complete, the local variable ``dense``."""
    variable = context.get_local("dense")
    storage = _storage(variable.as_fake())
    graph = context.graph()

    def check() -> None:
        for node in graph.nodes:
            if any(_storage(each.meta.get("example_value")) == storage for each in _changed(node)):
                raise RuntimeError(
                    f"compiled code changes the weight of a block-sparse layer in place ({node.target}), "
                    "which would be lost: do it outside of torch.compile, where it reaches its `values`"
                )

    translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    translator.output.add_cleanup_hook(check)


def _changed(node: Any) -> list[Any]:
    """Nodes whose tensors ``node`` writes to."""
    out = node.kwargs.get("out")
    written = list(out) if isinstance(out, (list, tuple)) else [out]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    if node.op in ("call_function", "call_method") and (in_place or node.target in _IN_PLACE) and node.args:
        first = node.args[0]
        written += list(first) if isinstance(first, (list, tuple)) else [first]
    return [each for each in written if hasattr(each, "meta")]


def _storage(tensor: Any) -> int:
    return tensor.untyped_storage()._cdata if hasattr(tensor, "untyped_storage") else 0
