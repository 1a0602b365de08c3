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
# # 5. A new model
#
# A provider ships a model today, and the log has few answers of it, or none. Onboarding gives it a column in an existing
# bundle within seconds and without training again: a mixture of the columns of the models that are there, starting from the
# sibling that it most resembles and the models of its tier, and moved by what outcomes there are.

# %% [markdown]
# ## The one cell to change
#
# `CARD` is the new model's card, one entry of a catalogue. Without one a model of the log plays the newcomer: a bundle is trained
# that has never seen it, and what the log knows of it can then be held against what is promised.

# %%
LOG = None  # a log directory, a Parquet, CSV or JSONL file, or a URL; None: a small simulated log
KIND = None  # what wrote LOG, if it is a gateway's export: litellm, langfuse, otel, portkey, helicone, table or store
CATALOG = None  # model cards, JSON; None: those that lie in the log
FOLDER = "work"  # where the log's bundles, registry and stores are kept
ENCODER = None  # "static", "lexical" or "transformer"; None: static, and lexical for the simulated log
CARD = None  # the new model's card, JSON; None: a model of the log plays it
MODEL = None  # which one; None: the one that the log named last
SIBLING = None  # the model that it most resembles; None: the card's own, or the models of its tier
POLICY = None  # the policy that decides what the router chooses, TOML; None: the default one

# %%
import polars as pl

from router_ml.catalog import card_to_json
from training.arrival import arrival
from training.challenge import Contender, challenge
from training.onboard import onboard_bundle
from training.workbench import workbench

# %matplotlib inline
pl.Config(fmt_str_lengths=300, tbl_rows=40, tbl_cols=-1, tbl_hide_dataframe_shape=True, float_precision=4)
bench = workbench(LOG, kind=KIND, catalog=CATALOG, folder=FOLDER, encoder=ENCODER, policy=POLICY)
card, bundle = bench.newcomer(CARD, model=MODEL)
card_to_json(card)

# %% [markdown]
# The card says what cannot be learnt: prices, context window, capabilities, and above all which regions and data classes it is
# cleared for. A clearance that is missing excludes the model, whatever its quality.
#
# ## What few outcomes are worth
#
# Bundles that know 0, 30, 100, and all of its earlier outcomes, each held against the same later answers. Look at three
# things. Does `promised` come nearer to `observed`? Does the interval get narrower? And does `claim`, which the dial is held
# against, rise with it? Little evidence leaves a low claim, so that a newcomer is not chosen for being overrated.

# %%
few = arrival(bundle, card, bench.log, bench.folder / "arrivals", sibling=SIBLING, policy=bench.policy)
few.to_frame()

# %%
few.plot()

# %% [markdown]
# `auc` is about telling its good answers from its bad ones. It hardly needs own outcomes, since what is hard for its siblings
# is hard for it, too; what own outcomes fix is the level. `share` is how many of these requests the router would send to
# it.
#
# The answers that it is judged by are those of requests that the log sent to it. Under a random draw these are like all
# others; where somebody chose them by hand, `observed` is of such requests only.
#
# ## What it changes
#
# The bundle without the newcomer against the one that knows its earlier outcomes, on requests that are new to both: what
# would it add to quality and cost, and which models would it take requests from? The paired change is doubly robust, as in
# `03_evaluate_and_promote`.

# %%
found = challenge(Contender.load(bundle, bench.policy), Contender.load(few.bundle, bench.policy), bench.log)
print("\n".join(found.notes), found.quality.why, found.cost_usd.why)
pl.concat([found.quality.to_frame(), found.cost_usd.to_frame()]).filter(pl.col("estimator") == "dr")

# %%
found.changes.filter(pl.col("to") == card.id)

# %% [markdown]
# If nothing moves to it, its claim is too low or it is too dear for what it can do; with a log that never drew it the change
# is not identifiable, and only exploration tells: `exploration_rate` in the policy, or an experiment that draws it against
# its sibling (`router-ml explore`).
#
# ## Onboard
#
# With everything that the log has of it. What the bundle says of the other models does not change, to the last bit, and it
# counts as trained until the newest of these outcomes, so that nothing is later judged on them.

# %%
wider = onboard_bundle(bundle, card, out=bench.folder / "wider-bundle", logs=bench.log, sibling=SIBLING)
wider.version, wider.outcomes

# %%
pl.DataFrame({"model": list(wider.mix), "weight": list(wider.mix.values())}).sort("weight", descending=True)

# %% [markdown]
# The weights are the mixture of columns that stands for the newcomer. They need not be positive, and a weight on one model
# says "alike on these requests" and nothing about who made it. From some thousand outcomes on, train again (`02_retrain`):
# onboarding is the bridge until then.
