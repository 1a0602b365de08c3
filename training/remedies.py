"""What to log from now on, in the order of its worth, each with the command or setting that does it."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from training.examination import LEAST_OUTCOMES, Check, Remedy


def remedies_for(checks: Sequence[Check], models: pl.DataFrame) -> tuple[Remedy, ...]:
    """What is missing in a log by its checks and its table of models, the most valuable first.

    First what keeps anything from being learnt (requests, outcomes, texts, a second model), then what keeps choices
    from being judged, then what makes costs and intervals right.
    """
    of = {check.topic: check for check in checks}

    def lacks(topic: str, *states: str) -> bool:
        return topic in of and of[topic].state in (states or ("missing", "partly"))

    if lacks("rows", "missing"):
        return (Remedy(
            "requests", "without them there is nothing to look at",
            "router-ml import litellm|langfuse|otel|portkey|helicone|table SOURCE --out LOG, or let router-ml serve "
            "--store FILE record decisions",
        ),)  # fmt: skip
    found = []
    if lacks("feedback"):
        why = "it says which answers were good, which is all that there is to learn"
        if lacks("feedback", "partly"):
            why = "more of it, and from all models alike, makes what is learnt surer"
        found.append(Remedy("feedback", why, "report it to POST /outcomes (quality, quality_source), or bring it late: "
                            "router-ml import feedback FILE --out LOG --rule NAME=thumbs"))  # fmt: skip
    if "prompts" in of and of["prompts"].numbers["unreadable"]:
        found.append(Remedy(
            "messages that can be read", "training refuses a log with a row whose conversation is none",
            "bring the source into a new log with router-ml import, which maps such rows or sets them aside",
        ))  # fmt: skip
    if lacks("prompts"):
        found.append(Remedy(
            "prompts", "an outcome teaches nothing without its request's text",
            "router-ml serve --store-prompts text; in LiteLLM general_settings: store_prompts_in_spend_logs: true",
        ))  # fmt: skip
    if lacks("models"):
        found.append(Remedy("cards of the models", "prices and what a model may serve come from there",
                            "give --catalog FILE to router-ml import and to this command"))  # fmt: skip
    used = models.filter(pl.col("rows") > 0)
    if len(used) < 2:
        found.append(Remedy(
            "answers of a second model", "with one model there is no choice to learn",
            "list it in the catalogue, and set exploration_rate = 0.02 in the policy (router-ml serve --policy FILE)",
        ))  # fmt: skip
    elif lacks("propensities"):
        found.append(Remedy(
            "random choices with their propensities", "only they tell what other choices would have brought",
            "exploration_rate = 0.02 in the policy of router-ml serve, which logs the propensity; elsewhere draw a "
            "share at random and log the probability as propensity",
        ))  # fmt: skip
    thin = used.filter(pl.col("outcomes") < LEAST_OUTCOMES)
    if len(thin) and len(used) > 1 and not (lacks("feedback", "missing") or lacks("prompts", "missing")):
        few = ", ".join(f"{row['model']} ({row['outcomes']})" for row in thin.head(3).iter_rows(named=True))
        found.append(Remedy(
            "more outcomes of models that have few", f"{LEAST_OUTCOMES} are the least to learn from: {few}",
            "router-ml explore MODEL_A MODEL_B --logs LOG --plan --out policy.toml says how many, and what they cost",
        ))  # fmt: skip
    judged = Remedy(
        "a second judgement of some answers", "it shows how far labels can be trusted",
        "bring a second source: router-ml import feedback FILE --out LOG --rule judge=score,reliability=0.8",
    )  # fmt: skip
    if lacks("label noise") and (pairs := of["label noise"].numbers.get("sources")):
        a, b = pairs[0]["a"], pairs[0]["b"]
        judged = Remedy(
            f"which of {a} and {b} is right", "they disagree, and what is learnt is their mean",
            "look at some answers on which they differ, and weigh the better one more: router-ml import feedback FILE "
            "--out LOG --rule NAME=score,reliability=0.95 --rule OTHER=score,reliability=0.6",
        )  # fmt: skip
    later = (
        ("cost and tokens", ("missing", "partly"), Remedy(
            "tokens, or costs", "costs are the other half of the choice",
            "report input_tokens and output_tokens, or cost_usd, to POST /outcomes",
        )),
        ("failures", ("missing", "partly"), Remedy(
            "status, retries and fallbacks", "a model that fails costs its retries, too",
            "report status and retries, and served_model after a fallback, to POST /outcomes",
        )),
        ("sessions", ("missing", "partly"), Remedy(
            "sessions", "requests of one conversation are not independent, and share a prompt cache",
            "send session with POST /route; in a gateway's log, its session id",
        )),
        ("label noise", ("not known", "partly"), judged),
        ("time", ("missing", "partly"), Remedy(
            "newer requests", "models and traffic change",
            "run the same router-ml import again: it adds what is new",
        )),
        ("clock", ("partly",), Remedy(
            "times as they were", "training holds out the newest requests, by these times",
            "log UTC with its time of day, from one clock; router-ml import sorts rows by time",
        )),
    )  # fmt: skip
    return (*found, *(remedy for topic, states, remedy in later if lacks(topic, *states)))
