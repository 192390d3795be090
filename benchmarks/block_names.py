"""Shapes of blocks as text: ``32x8`` is 32 outputs by 8 inputs, ``16`` is 16x16."""

from __future__ import annotations

from dynaprune_kernels.geometry import Block, check_block


def block_named(name: str) -> Block:
    """The block that ``name`` describes; ValueError where it describes none."""
    sides = tuple(int(side) for side in name.split("x"))
    if len(sides) > 2:
        raise ValueError(f"expected a block as OUTPUTSxINPUTS or as the edge of a square one, got {name!r}")
    return check_block(sides[0] if len(sides) == 1 else (sides[0], sides[1]))


def name_of(block: Block) -> str:
    """``32x8``."""
    return f"{block.outputs}x{block.inputs}"
