"""The slices that a value is broken down by: columns of a request log, or derived from its texts."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import numpy as np
import numpy.typing as npt
import polars as pl

Array = npt.NDArray[np.float64]
SLICES = ("task", "tenant", "tier", "language", "length")
ABSENT = "(none)"
_LENGTHS = ((100, "under 100 tokens"), (500, "100 to 500 tokens"), (2000, "500 to 2,000 tokens"))
_READ = 600
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
    ("el", re.compile(r"[\u0370-\u03ff]")),
    ("he", re.compile(r"[\u0590-\u05ff]")),
)
_STOP_WORDS = {
    "en": "the and of to is in that it for was on are with as at be this have from you what which how i my",
    "de": "der die und das ist nicht ich ein eine zu mit auf für von den dem wie wir sie es bitte",
    "fr": "le la les et des est une que pour dans qui pas sur avec ce je vous il du au quel",
    "es": "el la los las y que de es una por con para no se del lo como mi me cuál",
    "it": "il lo la gli che di è una per con non sono del della come mi ci quale dei",
    "pt": "o os as e que de é uma por com para não se do da como mas em um qual",
    "nl": "de het een en van is dat niet ik je met voor op zijn aan te wat hoe mijn",
    "pl": "i w nie na się z do jest to że jak co o dla czy po mi",
}
_LANGUAGE_OF = {lang: frozenset(words.split()) for lang, words in _STOP_WORDS.items()}


@cache
def language_of(text: str) -> str:
    """The language of a text by its script or its commonest words, as a two-letter code; "other" where none shows.

    Meant for breaking a report down, where a rare mistake costs nothing: it knows 16 languages.
    """
    text = text[:_READ].lower()
    letters = sum(map(str.isalpha, text))
    for code, script in _SCRIPTS:
        if letters and len(script.findall(text)) > 0.2 * letters:
            return code
    words = Counter(re.findall(r"[^\W\d_]+", text))
    found = {code: sum(words[w] for w in stop) for code, stop in _LANGUAGE_OF.items()}
    best = max(found, key=found.__getitem__)
    return best if found[best] > 1 else "other"


def slices_of(log: pl.DataFrame) -> pl.DataFrame:
    """A row per row of the log: its task, tenant, tier (where the log has such a column), language and length.

    Length is that of the input in tokens, a quarter of the characters where the log has none.
    """
    text = pl.coalesce(pl.col("prompt"), pl.col("messages")).fill_null("")
    tokens = pl.coalesce(pl.col("input_tokens"), text.str.len_chars() // 4)
    length = pl.lit("over 2,000 tokens")
    for most, name in reversed(_LENGTHS):
        length = pl.when(tokens < most).then(pl.lit(name)).otherwise(length)
    columns = [pl.col(name).fill_null(ABSENT) for name in ("task", "tenant", "tier") if name in log.columns]
    starts = log.select(text.str.head(_READ)).to_series().to_list()
    languages = pl.Series("language", [language_of(start) for start in starts], dtype=pl.String)
    language_of.cache_clear()  # it holds prompts
    return log.select(*columns, length.alias("length")).with_columns(languages)


def context_of(slices: pl.DataFrame, input_tokens: Array, *, least: int = 20, most: int = 15) -> Array:
    """What models of outcomes and feedback see of a request at least: indicators of its slices, and its length.

    float64 [n, k]; of each slice the `most` commonest values that have at least `least` rows. Tokens [n] may be NaN.
    """
    columns = []
    for name in slices.columns:
        counts = slices[name].value_counts(sort=True).filter(pl.col("count") >= least)
        if len(counts) > 1:
            columns += [(slices[name] == value).to_numpy().astype(np.float64) for value in counts[name][:most]]
    logs = np.log1p(input_tokens)
    columns.append(np.nan_to_num(logs, nan=float(np.nanmean(logs)) if np.isfinite(logs).any() else 0.0))
    return np.stack(columns, axis=1)
