"""Canaries: a share of the traffic that a second bundle, the challenger, decides, and what the log has to know of it.

Which bundle decides is drawn by unit: for each request, or once for all requests of a session or a tenant, by a hash
with a salt. A decision's propensity is taken over that draw, too: the probability of its model under the mixture of
both bundles, which importance weights need where either could have decided (the balance heuristic of Veach & Guibas
1995; Agarwal et al., arXiv 1703.06180, for logs of several policies). Where a unit has several requests they are one
draw: intervals need the cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from router_ml.errors import InputError
from router_ml.types import Arm, RouteDecision, RouteRequest

Unit = Literal["request", "session", "tenant"]


@dataclass(frozen=True, slots=True)
class CanaryPolicy:
    """How much of the traffic the challenger decides: the `share` of what `by` names. Raises InputError.

    A session is one of its API key and tenant. A request that names no session, or no tenant, is a unit of its own.
    Another `salt` draws anew; so does another challenger, so that not the same tenants try each. A greater share keeps
    the units that are in.
    """

    share: float = 0.0
    by: Unit = "session"
    salt: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0.0 <= self.share <= 1.0:
            raise InputError(f"canary.share has to be a number in [0, 1], not {self.share!r}")
        if self.by not in get_args(Unit):
            raise InputError(f"canary.by has to be one of {', '.join(get_args(Unit))}")
        if not isinstance(self.salt, str):
            raise InputError("canary.salt has to be a string")

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> CanaryPolicy:
        """The table `canary` of a policy file. Raises InputError."""
        if unknown := sorted(set(table) - set(cls.__dataclass_fields__)):
            known = ", ".join(cls.__dataclass_fields__)
            raise InputError(f"unknown setting 'canary.{unknown[0]}'; known are {known}")
        return cls(**table)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What was drawn for a request. `unit` is what was drawn for, `cluster` names it (None: this request alone)."""

    challenger: bool
    unit: Unit
    share: float
    cluster: str | None = None

    def arm(self, own: float) -> Arm:
        """What the decision is noted with; `own` is its propensity in its own arm."""
        return Arm("challenger" if self.challenger else "champion", self.unit, self.share, own, self.cluster)


def assign(policy: CanaryPolicy, version: str, request: RouteRequest, draw: float) -> Assignment:
    """Which arm a request is in, beside the challenger of this version; `draw` is uniform in [0, 1)."""
    if policy.by == "tenant" and request.tenant is not None:
        unit: tuple[str | None, ...] = ("tenant", request.tenant)
    elif policy.by == "session" and request.session is not None:
        unit = ("session", request.key, request.tenant, request.session)
    else:
        return Assignment(draw < policy.share, "request", policy.share)
    # Each part with its length before it: no name can imitate another unit's parts.
    parts = [b"-" if part is None else part.encode(errors="replace") for part in (policy.salt, version, *unit)]
    told = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    digest = hashlib.blake2b(told, digest_size=8, person=b"router-ml canary").digest()
    drawn = int.from_bytes(digest, "big") / 2**64
    return Assignment(drawn < policy.share, policy.by, policy.share, digest.hex())


def probability(preferred: RouteDecision, model: str) -> float:
    """How probably a router would choose `model`, from the decision that it makes on the request without exploring.

    What is not the probability of the preferred model is spread evenly over the others that exploration draws from.
    """
    if model == preferred.model:
        return preferred.propensity
    drawn = [c.model for c in preferred.candidates] if preferred.drawn is None else preferred.drawn
    return (1.0 - preferred.propensity) / (len(drawn) - (preferred.model in drawn)) if model in drawn else 0.0


def mixture(assigned: Assignment, served: RouteDecision, other: RouteDecision) -> float:
    """The probability of the served model over the draw of the arm and both bundles' exploration.

    `served` is the decision of the assigned arm, `other` the one that the other arm makes without exploring.
    """
    share = assigned.share if assigned.challenger else 1.0 - assigned.share
    return share * served.propensity + (1.0 - share) * probability(other, served.model)
