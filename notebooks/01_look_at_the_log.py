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
# # 1. Look at the log
#
# Before anything is trained: what does the log hold, and what can be learnt from it and judged on it? Nothing here fits a
# model. Four questions decide everything that follows.
#
# - *Volume and spend*: is there enough traffic, and enough money in it, for routing to be worth anything?
# - *Propensities*: with which probability was each model chosen? Without them nobody can say what another policy would
#   have earned, because hard requests may have gone to strong models on purpose (confounding by indication).
# - *Overlap*: have comparable requests gone to different models?
# - *Feedback*: of how many answers is the quality known, and who says so?

# %% [markdown]
# ## The one cell to change
#
# Everything below runs on your own log once `LOG` names it. A log that a gateway has kept in its own format takes `KIND`,
# too, and is imported first; its models' cards (prices, context windows, clearances) are a file, `CATALOG`.

# %%
LOG = None  # a log directory, a Parquet, CSV or JSONL file, or a URL; None: a small simulated log
KIND = None  # what wrote LOG, if it is a gateway's export: litellm, langfuse, otel, portkey, helicone, table or store
CATALOG = None  # model cards, JSON; None: those that lie in the log
FOLDER = "work"  # where the log's bundles, registry and stores are kept
BASELINE = None  # the model that spend is compared with, such as the one you would use for everything

# %%
import polars as pl

from router_ml.accounting import accounts
from training.compare import compare
from training.doctor import examine
from training.workbench import workbench

# %matplotlib inline
pl.Config(fmt_str_lengths=300, tbl_rows=40, tbl_cols=-1, tbl_hide_dataframe_shape=True, float_precision=4)
bench = workbench(LOG, kind=KIND, catalog=CATALOG, folder=FOLDER)
bench.log.select("request_id", "time", "tenant", "task", "model", "propensity", "cost_usd", "quality").head()

# %% [markdown]
# A row is one attempt: one request, the model that served it, and what became of it. `propensity` is the probability that
# the logging policy gave to that choice; `quality` lies in [0, 1], and is null where nobody said.
#
# ## Volumes and spend
#
# Sums are exact: each row's cost is rounded once to a nano-dollar and then only added. A call that reports no cost is priced
# by its tokens and its model's card; one that has neither is `open`, which is unknown and not 0.

# %%
by_day = accounts(bench.log, bench.catalog, by=["day"], baseline=BASELINE)
by_day.plot()

# %%
shown = ["calls", "reported", "priced", "open", "input_tokens", "output_tokens", "cost_usd", "savings_usd"]
accounts(bench.log, bench.catalog, by=["model"], baseline=BASELINE).to_frame().select("model", *shown)

# %% [markdown]
# Look for gaps between days (a gateway that stopped logging), for a model with most of the spend and a small part of the
# calls (that is where routing saves), and for `open` calls (their cost is missing from every sum below).

# %%
spend = accounts(bench.log, bench.catalog, by=["tenant", "task"], baseline=BASELINE).to_frame()
spend.sort("cost_usd", descending=True).select("tenant", "task", *shown)

# %% [markdown]
# ## What the log supports
#
# The doctor's checks, each in a sentence with its number, and below them what to log from now on, the most valuable first.
# "good" needs no action, "partly" limits what can be said, "missing" rules something out. Its thresholds are rules of thumb
# from published outcomes (docs/benchmarks.md): some 80 outcomes of a model until its requests can be told apart, some 230
# until more of them help little.

# %%
found = examine(bench.log, bench.catalog, now=bench.now)
print("\n".join(found.in_words))

# %%
found.plot()

# %% [markdown]
# ## Overlap
#
# Of each model: could the log tell what always choosing it would earn? `ess` is the effective sample size, that is how many
# independent rows the importance weights leave. Below 10 there is no number, below 100 intervals are not to be relied on.
# `unsupported` is the share of requests for which the logging policy could not have chosen it; where that is large, no
# amount of such logging helps, and only exploration does.

# %%
found.models

# %% [markdown]
# Pairs of models, task by task: comparable by "pairs" (the same requests went to both), by "drawn" (a random draw decided,
# so that the two groups of requests are alike), or not at all.

# %%
found.overlap.head(20)

# %% [markdown]
# What overlap is good for: the difference between two models on the same traffic, with its interval. Where the log does not
# identify it, `how` says so, and `experiment` has the number of randomised requests that would.

# %%
compared = compare(bench.log, bench.catalog, bench.catalog.ids[0], bench.catalog.ids[1])
print(compared.how, compared.why, compared.warnings)
compared.to_frame()

# %%
compared.plot()

# %% [markdown]
# ## Feedback
#
# The second selection: a quality is known only of answers that somebody, or a judge, spoke of. If bad answers bring feedback
# more often than good ones, a plain mean over known outcomes is too low, and more so for some models than for others. Large
# differences in `rate` are the sign to look for.

# %%
found.feedback

# %% [markdown]
# What these numbers assume: the times are right, sessions are independent of each other, and the propensities are those
# that the choices were really drawn with (the doctor tests the last one as far as a log can). If the doctor says that two
# models or more can be learnt, go on with `02_retrain`.
