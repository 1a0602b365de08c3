"""How small results are written: aside and renamed, and only with numbers that JSON knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_aside(path: Path, text: str) -> None:
    """Writes a text file aside and renames it, so that a reader sees the old one or the new one whole."""
    made_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def made_aside(path: Path, make: Callable[[Path], object]) -> None:
    """Has `make` write a file beside `path`, and renames it; nothing is left where that fails or is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        make(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not know: some databases refuse them."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
