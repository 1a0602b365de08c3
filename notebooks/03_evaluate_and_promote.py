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
# # 3. Evaluate and promote
#
# Champion against challenger: off-policy on the log, slice by slice; the conditions of the gate; what the challenger's shadow
# shows on live requests; promotion, and the way back. The question is not "is it better on average" but "can it be shown not
# to be worse, for anybody who matters".

# %% [markdown]
# ## The one cell to change
#
# With `REHEARSE` champions are moved in a copy of the registry, and nothing is served from that. Turn it off to promote
# for real what passed, which `router-ml promote` does as well.

# %%
LOG = None  # a log directory, a Parquet, CSV or JSONL file, or a URL; None: a small simulated log
KIND = None  # what wrote LOG, if it is a gateway's export: litellm, langfuse, otel, portkey, helicone, table or store
CATALOG = None  # model cards, JSON; None: those that lie in the log
FOLDER = "work"  # where the log's bundles, registry and stores are kept
ENCODER = None  # "static", "lexical" or "transformer"; None: static, and lexical for the simulated log
REGISTRY = None  # MLflow's tracking URI with a champion and a challenger; None: a registry of the notebooks' own
POLICY = None  # the policy that both are judged under, TOML; None: the default one
STORE = None  # the store of a service with a shadow, file or URL; None: the newest requests are replayed
REHEARSE = True  # False: move the champion of REGISTRY itself

# %%
import polars as pl

from router_ml.stored import told_decisions
from router_ml.tables import open_database
from training.challenge import challenge
from training.challenge_plots import calibration_plot
from training.gate import Limits, judge
from training.replay import replay
from training.shadowed import shadowed
from training.watch import watch
from training.workbench import workbench

# %matplotlib inline
pl.Config(fmt_str_lengths=300, tbl_rows=40, tbl_cols=-1, tbl_hide_dataframe_shape=True, float_precision=4)
bench = workbench(LOG, kind=KIND, catalog=CATALOG, folder=FOLDER, encoder=ENCODER, registry=REGISTRY, policy=POLICY)
champion, challenger = bench.champion(), bench.challenger()
champion.version, challenger.version

# %% [markdown]
# In the notebooks' own registry the champion is a router that was trained on the log's first tenth, and the challenger one
# of `02_retrain`: the case of a team that trained once and long ago.
#
# ## The off-policy report
#
# Judged on the newest requests that *neither* bundle has learnt from. The log's policy chose other models than either would:
# a row counts by the ratio of the probability that the judged policy gives its model to the probability that it was logged
# with. Doubly robust: a model of outcomes, corrected by the weighted errors that it makes, so that either may be wrong.

# %%
found = challenge(champion.contender, challenger.contender, bench.log)
print("\n".join(found.notes), found.quality.why, *found.quality.warnings)
found.to_frame()

# %%
found.plot()

# %% [markdown]
# The paired change, challenger less champion, is what to go by: it is much sharper than two separate intervals, because the
# two agree on many requests, which then say nothing about the difference. Its several estimators should agree within their
# intervals; `dr` is the headline.

# %%
pl.concat([found.quality.to_frame(), found.cost_usd.to_frame()])

# %% [markdown]
# ## Slices
#
# The intervals hold all at once (Bonferroni), so looking at the worst one is allowed. A wide interval is no bad news about
# the challenger but about the log: the slice is too small, or its models were rarely drawn.

# %%
found.slices.plot()

# %%
found.slices.to_frame()

# %% [markdown]
# Do the probabilities hold where the log asked each model, and what would move for whom? A residual below 0 is a promise
# that is not kept.

# %%
calibration_plot(found.calibration)

# %%
found.changes.head(10)

# %% [markdown]
# ## The gate
#
# Every condition has to hold, each with its number. Non-inferiority and not superiority: the lower bound of the quality change may
# lie at most 0.02 below 0, each slice of 500 requests at most 0.1, and where the log cannot show it, it does not hold. A bound
# that fails for lack of rows says how many it would take.

# %%
verdict = judge(
    found,
    champion.contender.router,
    challenger.contender.router,
    bundle=challenger.bundle,
    limits=Limits(),
    now=bench.now,
    rolled_back=bench.rolled_back(challenger),
)
verdict.to_frame()

# %% [markdown]
# ## The shadow
#
# On live traffic the challenger scores every request after the champion has answered it, and nothing of it is served. Two
# kinds of numbers come of that, and they differ in what they assume:
#
# - *own estimates*: what each bundle expects of what it prefers. They need no outcome, and so no patience; but a bundle
#   that overrates itself looks good by them.
# - *off-policy*: what the outcomes of served answers say of the challenger, as far as exploration has tried its choices.
#
# Without a `STORE` the log's newest requests go through the real service once more, on this machine and with much
# exploration, and no model is called. Outcomes are then those that the log has of the chosen model; of a simulated log they are drawn from
# its truth.

# %%
store = STORE or replay(
    bench.log,
    champion.bundle,
    challenger.bundle,
    bench.folder / "shadow",
    truth=bench.truth,
    policy=bench.policy,
)
shadow = shadowed(store)
print(f"{shadow.n} requests, the same model on {shadow.agreement:.0%} of them;", *shadow.notes, *shadow.why.values())
shadow.to_frame()

# %%
shadow.plot()

# %%
shadow.moves

# %% [markdown]
# If the two kinds disagree in sign, believe the outcomes and look at calibration. If there is no off-policy number, raise
# `exploration_rate`; an effective sample below 100 rows says that the interval is a rough one.
#
# ## Promote
#
# The alias `champion` moves in one call, and services that follow it swap the bundle within a poll. What failed the gate is
# not moved; `router-ml promote --force` overrules it, with a reason, on the record.

# %%
stage = bench.stage(rehearse=REHEARSE)
stage.promote(verdict, champion, challenger, reason="a retrained router, from notebook 03").says

# %% [markdown]
# ## Does it keep its promise?
#
# Once it serves, its decisions promise a P(ok), and outcomes answer. A confidence sequence bounds the mean residual at all
# looks together, so that one may look after every session without false alarms piling up. Here it is held against the
# shadow's store, for the champion that served there; `router-ml watch` does it all the time and rolls back by itself.

# %%
watched = watch(told_decisions(open_database(store), shadow.champion))
print(watched.why)
watched.plot()

# %% [markdown]
# ## Roll back
#
# The version before becomes champion again; the bundle that was taken back is remembered, and the gate refuses it until a
# new one is trained. Where nothing was promoted there is nothing to go back to, and it says so.

# %%
stage.rollback(reason="rehearsed in notebook 03").says

# %%
stage.history()
