"""Values as JSON has them."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """The same, with lists for tuples and None for numbers that are not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {name: plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
