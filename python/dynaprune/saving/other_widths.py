"""The widths that layers had before anything was cut out of them.

They tell a network that was cut from another network, at loading: a classifier of 10 outputs is no pruned
classifier of 5 or of 20. Layers carry them along (in copies and pickles too), and manifests record them.
"""

from __future__ import annotations

from collections.abc import Iterable

from dynaprune.nn.shape import LayerShape

_NAMED = 3
_REPLACE_AFTERWARDS = (
    "; pruning changes no width that the network is called with or answers in: for other inputs or another "
    "head load the network as it was saved and replace the layer afterwards"
)


def refuse_other_widths(pairs: Iterable[tuple[str, LayerShape, LayerShape]]) -> None:
    """Refuse a manifest of a network that was built with other widths than the model.

    Each width of the model is the one that is saved, or the one that the saved network was built with (or
    that the model was built with, where it is cut already). An older manifest does not say the latter: then
    no width may be larger than the model's, outputs may differ only where inputs differ too, and the reverse.

    Args:
        pairs: name, shape in the model, shape in the manifest of every layer.

    Raises:
        ValueError: names the layers, the widths expected and those that came.
    """
    wrong: list[str] = []
    narrower: dict[str, list[str]] = {"outputs": [], "inputs": []}
    for name, mine, saved in pairs:
        built = mine.original or (mine.out, mine.in_)
        stated = saved.original or (None, None)
        for index, what in enumerate(narrower):
            width, here = (mine.out, mine.in_)[index], built[index]
            came, first = (saved.out, saved.in_)[index], stated[index]
            if width == came or (first is not None and first in (width, here)):
                continue
            said = f"layer {name!r} has {here} {what} here and {came} in what is loaded"
            if first is None and came < here:
                narrower[what].append(said)
            else:
                wrong.append(said + (f", built with {first}" if first not in (None, came) else ""))
    if not all(narrower.values()):
        wrong += [*narrower["outputs"], *narrower["inputs"]]
    if wrong:
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ValueError(
            "expected the widths of this model, before or after cuts: "
            + "; ".join(wrong[:_NAMED])
            + more
            + _REPLACE_AFTERWARDS
        )
