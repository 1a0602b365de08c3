# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Cost and quality
#
# One dial, the least probability of an acceptable answer, moves a router along its frontier from cheap to good. What does each
# setting cost and earn on this traffic, which setting keeps a promise, what does a budget do to it, and what would other
# prices, or GPUs of one's own, change?

# %% [markdown]
# ## The one cell to change
#
# `DIAL` is the setting that questions are asked about. `SCALE` says how much traffic the log stands for: a sample of one
# request in a thousand has 1000. The simulated log is small, so that it stands for a thousandfold here.

# %%
LOG = None  # a log directory, a Parquet, CSV or JSONL file, or a URL; None: a small simulated log
KIND = None  # what wrote LOG, if it is a gateway's export: litellm, langfuse, otel, portkey, helicone, table or store
CATALOG = None  # model cards, JSON; None: those that lie in the log
FOLDER = "work"  # where the log's bundles, registry and stores are kept
ENCODER = None  # "static", "lexical" or "transformer"; None: static, and lexical for the simulated log
BUNDLE = None  # a bundle directory; None: the one that is trained on the log
POLICY = None  # the policy with today's tiers, TOML; None: the default one
DIAL = 0.85
MIN_QUALITY = 0.7  # a mean quality that is to be promised
BUDGET_SHARE = 0.7  # a budget, as a share of what the dial would spend in a month
REPRICED, INPUT_USD, OUTPUT_USD = "delta-70b", 0.30, 0.30  # a model, and what a million of its tokens may cost soon
HOSTED = "pocket-8b"  # a model on GPUs of one's own
AGAINST = ["aurora-4", "aurora-4-mini", "delta-70b"]  # models that are billed by the token
GPUS = {
    "gpus_per_replica": 1,
    "usd_per_gpu_hour": 2.5,
    "input_tokens_per_second": 12_000,
    "output_tokens_per_second": 3_000,
    "min_replicas": 2,
    "ops_usd_per_month": 1_000.0,
}
SCALE = 1_000.0
MOST_ROWS = 800  # requests that the trade-off is judged on; more take longer and give narrower bands

# %%
import polars as pl

from router_ml.budget import Budget
from router_ml.selfhost import Deployment, by_volume, host
from router_ml.traffic_shape import Traffic
from training.advise import advise
from training.flips import flips
from training.pacing import pace
from training.tradeoff import tradeoff
from training.tune import tune
from training.workbench import workbench

# %matplotlib inline
pl.Config(fmt_str_lengths=300, tbl_rows=40, tbl_cols=-1, tbl_hide_dataframe_shape=True, float_precision=4)
bench = workbench(LOG, kind=KIND, catalog=CATALOG, folder=FOLDER, encoder=ENCODER, policy=POLICY)
contender = bench.router(BUNDLE)
contender.version

# %% [markdown]
# ## The frontier
#
# Each setting's quality and cost a request, doubly robust, on requests that the bundle has not learnt from; the band is 95 % of
# each point by itself. A single model above the line is one that the router does not do justice to; a flat part is where
# money buys nothing.

# %%
curve = tradeoff(
    contender.router,
    bench.log,
    contender.manifest,
    settings=(0.0, 0.6, DIAL, 0.95),
    most_rows=MOST_ROWS,
)
curve.plot()

# %%
everything = curve.to_frame().filter(pl.col("by") == "all")
everything.select("policy", "min_probability", "model", pl.col("^quality.*$"), pl.col("^cost_usd.*$"))

# %% [markdown]
# ## Tiers
#
# A tier is a name for a setting. The dial is a promise of each request, not of the mean: at 0.7 every answer is *claimed* to
# be acceptable with at least 0.7, so that the mean lies above it. Which setting keeps a promised *mean* at the least cost? `tune` tests
# settings from the safest to the cheapest and stops at the first that fails (Learn then Test), so that all that passed hold at once, with
# 95 % confidence, and the cheapest of them may be taken without a correction for having looked.

# %%
curve.tiers_frame()

# %%
tuned = tune(contender.router, bench.log, contender.manifest, min_quality=MIN_QUALITY)
print(tuned.chosen or tuned.why, *tuned.assumptions, sep="\n")
tuned.plot()

# %% [markdown]
# ## Budgets
#
# What a month at `DIAL` costs, and what a smaller budget does to it. A budget is paced: where spending runs ahead of the
# calendar by more than a tenth, the dial moves down, never below its floor. Traffic is taken to come evenly, and cost and
# quality between two settings lie on the line between them.

# %%
free = pace(curve, Budget(usd=1e9, per="month", tenant="everybody"), DIAL)
tight = pace(curve, Budget(usd=BUDGET_SHARE * free.unpressed_usd, per="month", tenant="everybody"), DIAL)
print(f"a month at {DIAL:g}: {free.unpressed_usd:.4g} USD, quality {free.mean_quality:.3f}")
print(f"within {tight.budget.usd:.4g} USD: quality {tight.mean_quality:.3f}")
tight.plot()

# %% [markdown]
# If the dial ends far below where it began, the budget is not a brake but a lower setting with an unpleasant end of the
# month: choose the setting whose month fits, which is steadier and, where the frontier bends downwards, better on average.
#
# ## What if prices change
#
# The same requests decided under both catalogues. The learner's probabilities do not depend on prices, so nothing is trained
# again. "Stay" is what the old choices would cost at the new prices: the rest of the saving comes from choosing anew.

# %%
repriced = bench.catalog.with_prices(REPRICED, INPUT_USD, OUTPUT_USD)
flipped = flips(contender.router, bench.catalog, repriced, bench.log, sample=MOST_ROWS)
print(flipped.as_text(examples=0))
flipped.plot()

# %% [markdown]
# ## When does hosting pay?
#
# A deployment is paid by the hour, whether it works or not: redundancy and the peak decide, not the mean. The traffic's own
# hours are kept and only scaled. Where the lines cross, hosting the *whole* log's traffic begins to cost no more than the
# other model; it may end again where more volume takes more replicas. Throughput has to be that at the latency you
# need, measured on your own prompts: it is the assumption that most break-evens fail by.

# %%
hosting = host(Deployment(**GPUS), Traffic.of_log(bench.log, scale=SCALE))
volumes = by_volume(hosting, bench.catalog.subset(AGAINST).cards)
volumes.plot()

# %%
volumes.against_frame()

# %%
hosting.plot()

# %% [markdown]
# That compares costs alone. Whether the hosted model is *good enough*, and for which part of the traffic, is the question
# of the next section.
#
# ## Advice, segment by segment
#
# Kinds of traffic (task, tenant, then clusters of prompts, found without looking at outcomes), and what each could save elsewhere. A
# saving counts where the lower bounds of quality and saving both hold, and all intervals of all segments hold together: the
# best of many would otherwise be the luckiest of many. "explore" names the experiment that would settle a case, with its
# price. On a small log that is the usual, and the honest, answer.

# %%
advice = advise(bench.log, bench.catalog, deployment=Deployment(**GPUS), hosted=HOSTED, scale=SCALE)
advice.plot()

# %%
advice.to_frame().select("segment", "verdict", "model", "requests_per_month", "spend_usd", "saving_usd", "why")
