"""Values that JSON can hold."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["json_value"]


def json_value(value: Any) -> Any:
    """``value``, at any depth, with lists for tuples, text for keys, and None for numbers that are not
    finite."""
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
