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
# # 2. Retrain
#
# From a gateway's log to a registered challenger: import, features, training, calibration, comparison with baselines,
# registration. Training takes the older requests, and every figure below is from the newest ones, which it has not seen:
# a split by time, since a router is always used on traffic that comes after its training.

# %% [markdown]
# ## The one cell to change
#
# With a `REGISTRY` (such as `sqlite:///mlflow.db` or an MLflow server) the last step registers a version there. Without one
# there is a registry in `FOLDER`, from which nothing is served.

# %%
LOG = None  # a log directory, a Parquet, CSV or JSONL file, or a URL; None: a small simulated log
KIND = None  # what wrote LOG, if it is a gateway's export: litellm, langfuse, otel, portkey, helicone, table or store
CATALOG = None  # model cards, JSON; None: those that lie in the log
FOLDER = "work"  # where the log's bundles, registry and stores are kept
REGISTRY = None  # MLflow's tracking URI; None: a registry of the notebooks' own
ENCODER = None  # "static", "lexical" or "transformer"; None: static, and lexical for the simulated log
POLICY = None  # the policy that decides what the router chooses, TOML; None: the default one

# %%
import polars as pl

from features.load import load_estimator
from router_ml.bundle import read_bundle
from training.report import calibration_figure
from training.standing import standing
from training.train import train
from training.workbench import workbench

# %matplotlib inline
pl.Config(fmt_str_lengths=300, tbl_rows=40, tbl_cols=-1, tbl_hide_dataframe_shape=True, float_precision=4)
bench = workbench(LOG, kind=KIND, catalog=CATALOG, folder=FOLDER, registry=REGISTRY, encoder=ENCODER, policy=POLICY)

# %% [markdown]
# ## Import
#
# A gateway's export becomes a log through one door (`training.importers.importing.import_log`, on the command line
# `router-ml import`): values are cast one by one, bad rows are set aside with their reason, and what the log knows already is
# not added twice, so that the same import may run every night. `None` says that `LOG` was a log already.

# %%
bench.imported

# %% [markdown]
# ## Train
#
# The encoder is fitted or taken as it is; three outcome heads (kernel, lexical, network) estimate P(acceptable) of every model; a
# pooled LightGBM stacks them; Platt scaling per model, shrunk to all models, calibrates. Everything supervised is fitted
# out of fold with whole sessions in a fold, so that no row is judged by a model that has seen it.
#
# Only the chosen model's outcome is needed for each request. Where the log has propensities, calibration weighs by their
# inverse, since a model that mostly got easy requests would otherwise look too good.

# %%
made = train(bench.log, bench.catalog, out=bench.bundle, encoder=bench.encoder, holdout=bench.holdout)
made.version, made.params

# %%
pl.DataFrame(
    [{"of": "out of fold", **made.metrics["out_of_fold"]}, {"of": "held out", **made.metrics["held_out"]}],
    infer_schema_length=None,
).select("of", "auc", "brier", "log_loss", "ece")

# %% [markdown]
# AUC says how well good answers are told from bad ones of the *same* model: 0.5 is nothing, and on real traffic with noisy
# feedback 0.65 to 0.75 is usual and enough for routing to pay. A held-out AUC far below the out-of-fold one means that the
# traffic has changed: train on newer rows. The Brier score and the log loss also punish wrong levels; ECE is the mean
# distance between promised and observed rates over bins, and with few outcomes a part of it is noise.
#
# ## Features
#
# What the learner sees of one request, a row per candidate: the heads' estimates, their means over models, the model's
# success rate and prices, and the statistics of the text. The same code makes the row in serving, bit for bit.

# %%
path = load_estimator(read_bundle(bench.bundle)).featurizer
seen = path.transform(made.held_out.requests[0])
pl.DataFrame(seen.rows, schema=list(path.names)).insert_column(0, pl.Series("model", path.catalog.ids))

# %% [markdown]
# ## Calibration
#
# A point on the diagonal is a promise kept. Below it the router promises more than comes, and will choose that model too
# often; above it the model is underrated, and money is left on the table. The dial is held against a claim that lies below
# P(ok) by one standard deviation, so that what is little known is not chosen for being overrated.

# %%
calibration_figure(made)

# %% [markdown]
# ## Compare with baselines
#
# Off-policy, doubly robust, on the held-out requests: the router beside what takes no learning. *Always the cheapest* is the
# floor of cost. *The best single model* is what most teams do today. *The router shuffled* sends the same shares of traffic to
# the same models, but blindly: what the router gains over it is all that it knows of the single request. If `gain_low` is
# not above 0 there, the router has learnt a mixture and nothing more, and a fixed split would do as well.

# %%
stands = standing(bench.router(bench.bundle), bench.log)
print("\n".join(stands.notes))
stands.to_frame()

# %%
stands.plot()

# %% [markdown]
# Each interval stands for itself, at 95 %. They assume logged propensities and that feedback depends on nothing but request
# and model. Quality and cost are of the first answer under the policy's default tier; another dial moves the router along
# its frontier (`04_cost_quality`).
#
# ## Register a challenger
#
# One MLflow run with parameters, metrics, plots and the bundle (no pickle in it), and one version. The alias `challenger` points
# to it; the champion stays what it was, and only the gate of the next notebook replaces it. In a registry that has no
# champion yet the version becomes that.

# %%
version = bench.register(made)
version.name, version.version, version.alias, version.tags

# %%
bench.history()
