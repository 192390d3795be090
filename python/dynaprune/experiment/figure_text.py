"""A figure as people read it, with its unit."""

from __future__ import annotations

from typing import Any

__all__ = ["difference_kind", "shown"]


def _three_digits(value: float) -> str:
    """At least three digits, and never an exponent for a large number."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _scaled(value: float, steps: list[tuple[float, str]]) -> str:
    for factor, unit in steps:
        if abs(value) >= factor:
            return f"{_three_digits(value / factor)} {unit}"
    return _three_digits(value)


_DIFFERENCES = {"share": "points", "nats": "difference in nats", "number": "difference"}


def difference_kind(unit: str) -> str:
    """The kind, for `shown`, of a difference of two figures of a metric's ``unit``."""
    return _DIFFERENCES[unit]


def shown(value: Any, kind: str) -> str:
    """``value`` for people.

    Kinds are share, nats, number, seconds, time, count, bytes, flops, truth and ratio, and for differences
    those of `difference_kind`."""
    if value is None:
        return "-"
    if kind == "truth":
        return "yes" if value else "no"
    if kind == "share":
        return f"{100 * value:.2f} %"
    if kind == "nats":
        return f"{value:.4f}"
    if kind == "number":
        return f"{value:,.2f}"
    if kind == "ratio":
        return f"{value:.3f}"
    if kind == "points":
        return f"{100 * value:+.2f}"
    if kind in _DIFFERENCES.values():
        return f"{value:+.4f}" if kind == "difference in nats" else f"{value:+.2f}"
    if kind == "seconds":
        return f"{value:.1f} s"
    if kind == "time":
        return f"{_three_digits(1e3 * value)} ms"
    if kind == "bytes":
        return _scaled(value, [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")])
    if kind == "flops":
        return _scaled(value, [(1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP")])
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
