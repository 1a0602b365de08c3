"""What the registry's tags tell of the champions: who reigns, who was left and how, which bundle was rolled back.

`router_ml.rollout` writes these tags before it moves an alias, so that they hold whatever ends it: a promotion counts
once its version is champion or was left, and a rollback unless its version is champion still.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from router_ml.addresses import shown
from router_ml.errors import RegistryError
from router_ml.registry import CHAMPION, connect, registered, reported

if TYPE_CHECKING:
    from mlflow import MlflowClient

BUNDLE_VERSION = "bundle_version"  # as `training.tracking` tags every version
PROMOTED = "router_ml.promoted_us"  # this and the other times: microseconds since 1970
PROMOTED_BY = "router_ml.promoted_by"
PROMOTED_WHY = "router_ml.promoted_reason"
FORCED_WHY = "router_ml.forced_reason"
GATE = "router_ml.gate"
LEFT = "router_ml.champion_until_us"  # set on the champion just before a promotion leaves it
ROLLED_BACK = "router_ml.rolled_back_us"
ROLLED_BACK_BY = "router_ml.rolled_back_by"
ROLLED_BACK_WHY = "router_ml.rolled_back_reason"
RETURNED = "router_ml.returned_us"  # set on the version that a rollback goes to
RETURNED_BY = "router_ml.returned_by"
AUTOMATIC = "router_ml.returned_automatically"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reign:
    """The champion now: its version, its bundle's version, and since when (microseconds since 1970, 0: not known).

    `automatic` says that an automatic rollback led to it, and nobody has promoted a version since.
    """

    name: str
    version: str
    bundle: str | None
    since_us: int
    automatic: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What the registry knows of one version's time as champion; None where it does not, or where there was none.

    `promoted` is its latest promotion, `by` whom and with which `reason`; `rolled_back` stands when it was left by a
    rollback and has not been champion since. `gate` is the summary that the promotion was given.
    """

    version: str
    bundle: str | None
    aliases: tuple[str, ...]
    promoted: datetime | None
    by: str | None
    forced: bool
    reason: str | None
    until: datetime | None
    rolled_back: datetime | None
    rolled_back_by: str | None
    rolled_back_reason: str | None
    gate: Mapping[str, Any] | None


@dataclass(frozen=True)
class Registry:
    """One look: where the aliases point to, and the tags of every version."""

    client: MlflowClient
    uri: str
    name: str
    aliases: Mapping[str, str]
    tags: Mapping[str, Mapping[str, str]]

    @property
    def champion(self) -> str | None:
        """The version that the alias points to."""
        return self.aliases.get(CHAMPION)

    def us(self, version: str, *keys: str) -> int:
        """The latest of these times of a version, -1 where it has none."""
        values = (self.tags.get(version, {}).get(key, "") for key in keys)
        return max((int(v) for v in values if v.isascii() and v.isdecimal()), default=-1)

    def bundle(self, version: str) -> str:
        """What tells bundles apart: a version without the tag is a bundle of its own."""
        return self.tags.get(version, {}).get(BUNDLE_VERSION) or f"version {version}"

    def was_promoted(self, version: str) -> bool:
        """Whether its promotion came to pass: its tags are older than the move, and a killed process never made it."""
        promoted = self.us(version, PROMOTED)
        return promoted >= 0 and (version == self.champion or self.us(version, LEFT, ROLLED_BACK) >= promoted)

    def rolled_back(self, version: str) -> str | None:
        """The version by whose rollback this version's bundle was left for good, None where it was not."""
        same = [v for v in self.tags if self.bundle(v) == self.bundle(version)]
        if self.champion in same or not same:
            return None
        latest = max(same, key=lambda v: self.us(v, ROLLED_BACK))
        return latest if self.us(latest, ROLLED_BACK) > max(self.us(v, LEFT) for v in same) else None

    def last_champion(self, *but: str) -> str | None:
        """The version that was left last and not by a rollback, of other bundles than those of the versions `but`."""
        bundles = {self.bundle(v) for v in but}
        found = [v for v in self.tags if self.us(v, LEFT) >= 0 and self.bundle(v) not in bundles]
        return max((v for v in found if not self.rolled_back(v)), key=lambda v: self.us(v, LEFT), default=None)

    def tag(self, version: str, values: Mapping[str, str | None]) -> None:
        """Writes tags in their order; None takes one away."""
        for key, value in values.items():
            if value is not None:
                self.client.set_model_version_tag(self.name, version, key, value)
            elif key in self.tags[version]:
                self.client.delete_model_version_tag(self.name, version, key)

    def point(self, alias: str, version: str | None) -> None:
        """Points the alias at a version in one call, or takes it away."""
        if version is not None:
            self.client.set_registered_model_alias(self.name, alias, version)
        elif alias in self.aliases:
            self.client.delete_registered_model_alias(self.name, alias)


def rolled_back(uri: str, name: str, version: str) -> str | None:
    """Why the bundle of this version was rolled back, None where it was not, or has been champion since.

    Every version of the same bundle counts as the one that was left. Raises RegistryError.
    """
    found = _find(uri, name)
    by = found.rolled_back(str(version))
    return None if by is None else found.tags[by].get(ROLLED_BACK_WHY, "")


def reign(uri: str, name: str) -> Reign:
    """Which version is champion now, and since when. Raises RegistryError, also where there is none."""
    found = _find(uri, name)
    version = found.champion
    if version is None:
        raise RegistryError(f"model {name!r} in {shown(uri)} has no champion: promote one first")
    returned, promoted = found.us(version, RETURNED), found.us(version, PROMOTED)
    return Reign(
        name=name,
        version=version,
        bundle=found.tags[version].get(BUNDLE_VERSION),
        since_us=max(returned, promoted, 0),
        automatic=returned > promoted and AUTOMATIC in found.tags[version],
    )


def history(uri: str, name: str) -> tuple[Past, ...]:
    """What the registry knows of every version as champion, the newest version first. Raises RegistryError."""
    found = _find(uri, name)
    rows = []
    for version in sorted(found.tags, key=int, reverse=True):
        tags = found.tags[version] if found.was_promoted(version) else {}
        left = found.us(version, ROLLED_BACK) > found.us(version, LEFT) and version != found.champion
        back = found.tags[version] if left else {}
        until = found.us(version, LEFT, *([ROLLED_BACK] if left else []))
        rows.append(
            Past(
                version=version,
                bundle=found.tags[version].get(BUNDLE_VERSION),
                aliases=tuple(sorted(alias for alias, of in found.aliases.items() if of == version)),
                promoted=time_of(found.us(version, PROMOTED)) if tags else None,
                by=tags.get(PROMOTED_BY),
                forced=FORCED_WHY in tags,
                reason=tags.get(FORCED_WHY, tags.get(PROMOTED_WHY)),
                until=None if until < 0 or version == found.champion else time_of(until),
                rolled_back=time_of(found.us(version, ROLLED_BACK)) if left else None,
                rolled_back_by=back.get(ROLLED_BACK_BY),
                rolled_back_reason=back.get(ROLLED_BACK_WHY),
                gate=json.loads(tags[GATE]) if GATE in tags else None,
            )
        )
    return tuple(rows)


def _find(uri: str, name: str) -> Registry:
    client = connect(uri)
    with reported(uri):
        return look(client, uri, name)


def look(client: MlflowClient, uri: str, name: str, *, tags: bool = True) -> Registry:
    """One look at the model `name`; without `tags` at its aliases alone. MLflow's errors are not translated."""
    # A search leaves the aliases out, and the model has them all as of one moment.
    aliases = {alias: str(version) for alias, version in registered(client, uri, name).aliases.items()}
    versions: dict[str, Mapping[str, str]] = {}
    token = None
    while tags:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        versions |= {str(found.version): dict(found.tags) for found in page}
        token = page.token
        if not token:
            break
    return Registry(client, uri, name, aliases, versions)


def time_of(us: int) -> datetime:
    """Microseconds since 1970 as a time, UTC."""
    return datetime.fromtimestamp(us / 1e6, UTC)
