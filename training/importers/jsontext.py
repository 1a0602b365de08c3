"""What stands under some keys of JSON objects, as it was written: the one reading of nested JSON that importers share.

polars' reader of JSON lines gives nested values back without their escapes, so it is not used for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import msgspec
import polars as pl

Texts = tuple[str | None, ...]
_SLICE = 8_192
_ABSENT = msgspec.Raw()
_string = msgspec.json.Decoder(str).decode
_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
# What msgspec raises for JSON that it does not take; Python's reader takes some of it: NaN, half a surrogate pair.
REFUSED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@lru_cache(maxsize=256)
def fields_of(keys: tuple[str, ...]) -> Callable[[str | bytes], Texts | None]:
    """A reader of JSON objects that gives what stands under each of the keys; None for what is no JSON object.

    A JSON string is given as the string, null or an absent key as None, anything else as the JSON text that was
    written. Of a key that comes twice the last holds. Bytes have to be UTF-8.
    """
    fields = [(f"f{at}", msgspec.Raw, _ABSENT) for at in range(len(keys))]
    names = {f"f{at}": key for at, key in enumerate(keys)}
    astuple = msgspec.structs.astuple
    try:
        decode = msgspec.json.Decoder(msgspec.defstruct("Fields", fields, rename=names, gc=False)).decode
    except ValueError:  # a key with a quote or a backslash
        return partial(_any_keys, keys=keys)

    def read(text: str | bytes) -> Texts | None:
        try:
            return tuple([None if raw is _ABSENT else text_of(raw) for raw in astuple(decode(text))])
        except REFUSED:
            return _slowly(text, keys)

    return read


def _any_keys(text: str | bytes, keys: tuple[str, ...]) -> Texts | None:
    try:
        found = _object(text)
        return tuple(text_of(found.get(key, _ABSENT)) for key in keys)
    except REFUSED:
        return _slowly(text, keys)


def text_of(raw: msgspec.Raw) -> str | None:
    """A value as `fields_of` gives it."""
    text = bytes(raw).decode()
    if text[:1] == '"':
        return _string(text) if "\\" in text else text[1:-1]
    return text if text and text != "null" else None


def _slowly(text: str | bytes, keys: tuple[str, ...]) -> Texts | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return tuple(written(found.get(key)) for key in keys) if isinstance(found, dict) else None


def written(value: Any) -> str | None:
    """A value of Python's as `fields_of` gives it; halves of surrogate pairs, which no text may have, are replaced."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def keys_of(column: pl.Series, keys: Sequence[str]) -> pl.DataFrame:
    """What stands under some keys of JSON objects (`fields_of`), a column of text each; null where there is no object.

    The column is JSON text, or null.
    """
    read, nothing = fields_of(tuple(keys)), (None,) * len(keys)
    schema = dict.fromkeys(keys, pl.String())
    pieces = [pl.DataFrame(schema=schema)]
    texts = column.cast(pl.String)
    if texts.null_count() == len(texts):
        return pl.DataFrame({key: texts.clear(len(texts)) for key in keys}, schema=schema)
    for at in range(0, len(texts), _SLICE):
        found = [nothing if text is None else read(text) or nothing for text in texts[at : at + _SLICE].to_list()]
        columns = zip(keys, zip(*found, strict=True), strict=True)
        pieces.append(pl.DataFrame([pl.Series(key, values, dtype=pl.String) for key, values in columns]))
    return pl.concat(pieces)
