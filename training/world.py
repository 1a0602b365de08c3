"""What is true in the simulated world: its models, how good they are at what, who asks, and what fails how often.

Every array's model axis is `SIMULATED_CATALOG`, its family axis `traffic.FAMILIES`, its tenant axis `TENANTS`.
"""

from __future__ import annotations

import numpy as np

from router_ml.catalog import Catalog
from router_ml.types import ModelCard

_EVERY = frozenset({"public", "internal"})
SIMULATED_CATALOG = Catalog(
    (
        ModelCard(
            id="aurora-4",
            provider="borealis",
            tier="frontier-closed",
            input_usd_per_mtok=3.0,
            output_usd_per_mtok=15.0,
            context_window=200_000,
            capabilities=frozenset({"tools", "vision", "json"}),
            regions=frozenset({"us", "eu"}),
            data_classes=_EVERY,
        ),
        ModelCard(
            id="summit-pro",
            provider="cairn",
            tier="frontier-closed",
            input_usd_per_mtok=2.5,
            output_usd_per_mtok=10.0,
            context_window=128_000,
            capabilities=frozenset({"tools", "vision", "json"}),
            regions=frozenset({"us"}),
        ),
        ModelCard(
            id="aurora-4-mini",
            provider="borealis",
            tier="mid-closed",
            input_usd_per_mtok=0.4,
            output_usd_per_mtok=1.6,
            context_window=128_000,
            capabilities=frozenset({"tools", "json"}),
            regions=frozenset({"us", "eu"}),
            data_classes=_EVERY,
        ),
        ModelCard(
            id="delta-70b",
            provider="riverbed",
            tier="hosted-open",
            input_usd_per_mtok=0.88,
            output_usd_per_mtok=0.88,
            context_window=131_072,
            capabilities=frozenset({"tools", "json"}),
            regions=frozenset({"us", "eu"}),
        ),
        ModelCard(
            id="quill-8x7b",
            provider="riverbed",
            tier="hosted-open",
            input_usd_per_mtok=0.24,
            output_usd_per_mtok=0.24,
            context_window=32_768,
            capabilities=frozenset({"json"}),
            regions=frozenset({"eu"}),
        ),
        ModelCard(
            id="pocket-8b",
            provider="self-hosted",
            tier="self-hosted-open",
            input_usd_per_mtok=0.05,
            output_usd_per_mtok=0.05,
            context_window=8_192,
            regions=frozenset({"us", "eu"}),
            data_classes=frozenset({"public", "internal", "confidential"}),
        ),
    )
)
# The model of the highest mean probability of success, which `mostly-best` prefers.
BEST = "aurora-4"
# Log-odds of an acceptable answer to a request of average difficulty; rows are FAMILIES, columns the catalogue.
STRENGTH = np.array(
    [
        [2.7, 2.2, 2.1, 1.7, 1.4, 1.0],
        [2.3, 2.7, 1.1, 1.4, 0.1, -0.5],
        [2.8, 2.5, 2.4, 2.2, 1.2, 1.7],
        [2.4, 1.8, 1.6, 1.0, 2.4, 0.2],
        [2.5, 2.0, 1.2, 1.3, 0.7, -0.2],
        [2.3, 2.6, 1.2, 1.1, 0.0, -0.4],
        [2.8, 2.4, 2.5, 2.0, 2.2, 1.7],
    ]
)
SLOPE = np.array([0.55, 0.55, 0.9, 0.9, 1.0, 1.3])  # log-odds lost per unit of difficulty
LEVEL_SHARE = np.array([0.35, 0.30, 0.20, 0.15])
HIDDEN_SD, MODEL_SD = 0.6, 0.35  # of the log-odds, invisible in the text: shared by all models, and per model
OUTAGE = np.array([0.004, 0.006, 0.004, 0.012, 0.012, 0.020])  # no attempt succeeds
GLITCH = np.array([0.01, 0.02, 0.01, 0.04, 0.04, 0.06])  # one attempt fails, the next may do
FAILURES = ("error", "timeout", "rate_limited")
FAILURE_SHARE = np.array(
    [[0.3, 0.4, 0.3], [0.4, 0.2, 0.4], [0.3, 0.4, 0.3], [0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.2, 0.8, 0.0]]
)
MAX_RETRIES = 2
FAILED_MS = 2_000.0  # what a failed attempt costs in time
FALLBACK_ORDER = (0, 2, 3, 1, 4, 5)
CANCELLED = 0.002
OUTPUT_TOKENS = np.array([140.0, 320.0, 160.0, 130.0, 260.0, 300.0, 90.0])
TOKENS_PER_LEVEL, FOLLOW_UP_LENGTH, TOKENS_SD = 0.35, 0.7, 0.4
VERBOSITY = np.array([1.15, 1.0, 0.9, 1.05, 0.85, 0.8])
FIRST_TOKEN_MS = np.array([600.0, 500.0, 250.0, 350.0, 250.0, 120.0])
TOKENS_PER_S = np.array([60.0, 70.0, 150.0, 80.0, 120.0, 55.0])
SOURCES = ("user", "check", "check", "review", "review", "check", "user")
# Tenant: its share of the traffic, region, whether it tags tasks, falls back, sends tools; and its mix of families.
TENANTS = ("acme-retail", "northbank", "lexfirm", "devtools", "tutorly")
TENANT_SHARE = np.array([0.30, 0.20, 0.15, 0.20, 0.15])
REGION = ("us", "eu", "eu", "us", "us")
TAGS = np.array([True, True, False, True, False])
FALLS_BACK = np.array([True, True, False, True, False])
TOOLS_SHARE = np.array([0.25, 0.0, 0.0, 0.3, 0.0])
MIX = np.array(
    [
        [0.55, 0.00, 0.10, 0.15, 0.00, 0.00, 0.20],
        [0.30, 0.00, 0.30, 0.05, 0.25, 0.00, 0.10],
        [0.00, 0.00, 0.10, 0.25, 0.55, 0.00, 0.10],
        [0.05, 0.75, 0.05, 0.00, 0.00, 0.05, 0.10],
        [0.00, 0.10, 0.00, 0.10, 0.00, 0.60, 0.20],
    ]
)
KEYS = 3
TURNS = np.array([0.80, 0.08, 0.05, 0.03, 0.02, 0.02])  # of a session; its requests share family and difficulty
PAUSE_S = 45.0  # between two turns
TOOL_SETS = (
    '[{"type":"function","function":{"name":"find_order","parameters":{"type":"object","properties":'
    '{"number":{"type":"string"}},"required":["number"]}}}]',
    '[{"type":"function","function":{"name":"run_sql","parameters":{"type":"object","properties":'
    '{"query":{"type":"string"},"limit":{"type":"integer"}}}}},{"type":"function","function":{"name":"read_file",'
    '"parameters":{"type":"object","properties":{"path":{"type":"string"}}}}}]',
)
