"""Addresses of registries and stores as errors, logs and answers may show them: without what they hold of secrets."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

_SECRET = re.compile(r"(?i)((?:^|[?&;\s])[\w.%-]*(?:password|passwd|pwd|token|secret|key)=)[^&\s]+")
# Where a user is followed by a colon, SQLAlchemy takes all up to an @ for the password, slashes with it; whatever could
# be one goes, up to the last @ of the word, so that of an @ in a path more may go than has to.
_USER_AND_PASSWORD = re.compile(r"://[^:/\s]*:\S*@")
_USER = re.compile(r"://[^/?#\s]*@")
_SHORTEST = 4  # characters of a secret that is looked for by itself: shorter ones are in every other word


def shown(text: str) -> str:
    """An address, or a text that quotes some, with `***` for users, passwords and tokens of addresses."""
    text = _SECRET.sub(r"\1***", text)
    return _USER.sub("://***@", _USER_AND_PASSWORD.sub("://***@", text))


def redacted(text: str, address: str) -> str:
    """What a library says of `address`, in one line and without its secrets, however they are quoted there."""
    text = text.replace(address, shown(address))
    for secret in sorted(_secrets(address), key=len, reverse=True):
        text = text.replace(secret, "***")
    return shown(" ".join(text.split()))


def _secrets(address: str) -> set[str]:
    found = {m[0].removeprefix(m[1]) for m in _SECRET.finditer(address)}
    rest = _SECRET.sub(r"\1", address)
    for match in (_USER_AND_PASSWORD.search(rest), _USER.search(rest)):
        if match is not None:
            user, colon, password = match[0][3:-1].partition(":")
            found.add(password if colon else user)
    found |= {unquote_plus(secret) for secret in found}
    return {secret for secret in found if len(secret) >= _SHORTEST and secret != "***"}
