"""Which blocks of a network lived when: the densities at every change, and now and then the masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynaprune.experiment.write import write_csv, write_json
from dynaprune.saving.durable import write_file

if TYPE_CHECKING:
    from dynaprune.nn import BlockSparseLayer

__all__ = ["MaskRecord"]

FRAME_EVERY = 0.04


@dataclass
class _Frame:
    """The live blocks of every layer after ``step`` steps: root mean square weight per block, 0 where
    dead."""

    step: int
    sparsity: float
    layers: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, int]]


class MaskRecord:
    """The history of a network for the pictures. ``layers`` are those that are pruned, by their names: fewer
    where some are released."""

    def __init__(self, layers: Mapping[str, BlockSparseLayer]) -> None:
        self._shapes = {name: _matrix_shape(layer) for name, layer in layers.items()}
        self._densities: list[dict[str, Any]] = []
        self._frames: list[_Frame] = []

    def add(
        self,
        step: int,
        sparsity: float,
        density: Mapping[str, float],
        layers: Mapping[str, BlockSparseLayer],
    ) -> None:
        """Take the ``density`` of each layer after ``step`` steps, and the masks where the sparsity has grown
        by 0.04 since they were taken."""
        self._densities.append({"step": step, "sparsity": sparsity, **density})
        if not self._frames or sparsity - self._frames[-1].sparsity >= FRAME_EVERY:
            self._frames.append(_frame(step, sparsity, layers))

    def state_dict(self) -> dict[str, Any]:
        """Everything that was taken so far: plain values, and the masks as tensors."""
        return {
            "densities": self._densities,
            "frames": [
                {
                    "step": frame.step,
                    "sparsity": frame.sparsity,
                    "layers": {name: torch.from_numpy(image) for name, image in frame.layers.items()},
                    "shapes": frame.shapes,
                }
                for frame in self._frames
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what an earlier part of the training took."""
        self._densities = [dict(row) for row in state["densities"]]
        self._frames = [
            _Frame(
                frame["step"],
                frame["sparsity"],
                {name: image.clone().numpy() for name, image in frame["layers"].items()},
                {name: (rows, columns) for name, (rows, columns) in frame["shapes"].items()},
            )
            for frame in state["frames"]
        ]

    def write(self, out: Path, step: int, sparsity: float, layers: Mapping[str, BlockSparseLayer]) -> None:
        """Write ``density.csv`` (layer by step), ``masks.json`` and ``masks.npz`` (the masks) into ``out``;
        the last masks are those of now, after ``step`` steps."""
        if self._frames[-1].step != step:
            self._frames.append(_frame(step, sparsity, layers))
        names = dict.fromkeys(name for row in self._densities for name in row)
        whole = dict.fromkeys(names, 1.0)  # as layers are before it is known that they get narrower
        write_csv(out / "density.csv", [{**whole, **row} for row in self._densities])
        arrays: dict[str, np.ndarray] = {}
        index = []
        for number, frame in enumerate(self._frames):
            images: dict[str, Any] = {}
            for name, image in frame.layers.items():
                key = f"frame{number}_layer{len(images)}"
                arrays[key] = image
                images[name] = {"key": key, "shape": list(frame.shapes[name])}
            index.append({"step": frame.step, "sparsity": frame.sparsity, "layers": images})
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        write_json(out / "masks.json", {"shapes": shapes, "frames": index})
        write_file(out / "masks.npz", lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def _frame(step: int, sparsity: float, layers: Mapping[str, BlockSparseLayer]) -> _Frame:
    return _Frame(
        step,
        sparsity,
        {name: _block_rms(layer) for name, layer in layers.items()},
        {name: _matrix_shape(layer) for name, layer in layers.items()},
    )


def _matrix_shape(layer: BlockSparseLayer) -> tuple[int, int]:
    """Outputs and inputs (for a convolution channels x taps) of the dense weight the layer stands for."""
    outputs, *inputs = layer.layout.dense_shape
    return outputs, math.prod(inputs)


def _block_rms(layer: BlockSparseLayer) -> np.ndarray:
    """Root mean square of each live block's weights ``[rows, columns]`` float16, 0 where no block lives."""
    layout = layer.layout
    slots = layout.slot_of_block.long()
    rms = layer.values.detach().float().pow(2).mean(dim=(1, 2)).sqrt().clamp(min=1e-6)
    image = torch.where(layout.mask & (slots >= 0), rms[slots.clamp(min=0)], torch.zeros(()).to(rms))
    return image.cpu().numpy().astype(np.float16)
