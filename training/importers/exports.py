"""Exports that are a folder of files: read one after the other, each from where it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from router_ml.errors import InputError
from training.importers.batch import ReadOptions
from training.importers.files import Chunk, read_columns

ENDINGS = (".parquet", ".csv", ".jsonl", ".ndjson")


def read_export(
    source: str,
    wanted: Iterable[str],
    options: ReadOptions,
    *,
    folders: Iterable[str] = (),
) -> Iterator[tuple[Chunk, dict[str, Any]]]:
    """Chunks of a file, or of all files of a folder and of those of its `folders` that are there, with their cursors.

    Files are read in the order of their names, a folder after the other. Raises InputError for a folder with no file to
    read, for one with compressed ones, which would be left out, and as `read_columns` does.
    """
    path, names = Path(source), list(wanted)
    cursors: dict[str, Any] = dict((options.cursor or {}).get("files", {}))
    for file in _files(path, folders) if path.is_dir() else [path]:
        name = file.name if file == path else file.relative_to(path).as_posix()
        for chunk in read_columns(file, names, cursor=cursors.get(name), chunk_rows=options.chunk_rows):
            cursors[name] = chunk.cursor
            yield chunk, {"files": dict(cursors)}


def _files(path: Path, folders: Iterable[str]) -> list[Path]:
    places = [place for place in (path, *(path / name for name in folders)) if place.is_dir()]
    found = [file for place in places for file in sorted(place.iterdir()) if file.is_file()]
    if packed := [file for file in found if file.suffix == ".gz"]:
        raise InputError(f"{packed[0]} is compressed: unpack it first (gunzip {packed[0].name})")
    files = [file for file in found if file.suffix.lower() in ENDINGS]
    if not files:
        raise InputError(f"{path} has no file that ends in {', '.join(ENDINGS)}: name the file or the export's folder")
    return files
