"""What deploy/ says is true of the program: metrics, options, paths, files and times; and the linters find nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser as promql
import pytest
import yaml
from command_lines import mistakes
from live_service import ROOT, running
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
OF_THE_SCRAPE = {"job", "instance"}  # labels that Prometheus adds


@dataclass
class Scrape:
    """What a live /metrics holds: the names of its series, their labels, and the labels' values."""

    labels: dict[str, dict[str, set[str]]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def scrape(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Scrape:
    """A service that has decided, refused, heard outcomes of every kind and had a circuit opened."""
    with running(tiny_bundle, tmp_path_factory.mktemp("store") / "router.db") as live:
        for body in ({"prompt": "x"}, {"prompt": "x", "data_class": "top"}, {"prompt": "x", "min_probability": 1.0}):
            answer = live.http.post("/route", json=body).json()
            for status in ("ok", "error"):
                outcome = {"status": status, "cost_usd": 0.1, "quality": 0.5, "served_model": answer.get("model", "?")}
                live.http.post("/outcomes", json={"decision_id": answer.get("decision_id", "?"), **outcome})
        live.http.put("/models/mid/health", json={"state": "open"})
        found = Scrape()
        for family in text_string_to_metric_families(live.http.get("/metrics").text):
            for sample in family.samples:
                labels = found.labels.setdefault(sample.name, {})
                for name, value in sample.labels.items():
                    labels.setdefault(name, set()).add(value)
    return found


def selectors(node: Any) -> Iterator[Any]:
    """The vector selectors of a PromQL expression."""
    if isinstance(node, promql.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "param", "vector_selector"):
        if isinstance(below := getattr(node, name, None), promql.Expr):
            yield from selectors(below)
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


def grouped(node: Any) -> Iterator[str]:
    """The labels that its aggregations keep."""
    if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
        yield from node.modifier.labels
    for name in ("expr", "lhs", "rhs"):
        if isinstance(below := getattr(node, name, None), promql.Expr):
            yield from grouped(below)
    for argument in getattr(node, "args", None) or ():
        yield from grouped(argument)


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DEPLOY / "grafana" / "router-ml.json").read_text(encoding="utf-8")))


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return list(group["rules"])


def expressions() -> dict[str, str]:
    """Every PromQL expression of dashboard and alerts, Grafana's variables filled in."""
    found = {rule["alert"]: rule["expr"] for rule in rules()}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    found |= {f"annotation {a['name']}": a["expr"] for a in dashboard()["annotations"]["list"]}
    filled = {"$__rate_interval": "5m", "$__range": "6h", "$job": ".*"}
    return {where: re.sub(r"\$\w+", lambda m: filled[m[0]], expr) for where, expr in found.items()}


def test_every_expression_asks_for_metrics_and_labels_that_exist(scrape: Scrape) -> None:
    wrong = []
    for where, text in expressions().items():
        expression = promql.parse(text)
        for selector in (found := list(selectors(expression))):
            if selector.name == "up":  # Prometheus' own
                continue
            if selector.name not in scrape.labels:
                wrong.append(f"{where}: no metric {selector.name}")
                continue
            labels = scrape.labels[selector.name]
            for matcher in selector.matchers.matchers:
                if matcher.name not in labels.keys() | OF_THE_SCRAPE:
                    wrong.append(f"{where}: {selector.name} has no label {matcher.name}")
        known = {label for selector in found for label in scrape.labels.get(selector.name, ())} | OF_THE_SCRAPE
        wrong += [f"{where}: grouped by {label}" for label in grouped(expression) if label not in known]
        assert found, f"{where} asks for nothing"
    assert wrong == []


def test_the_check_sees_what_is_wrong(scrape: Scrape) -> None:
    (selector,) = selectors(promql.parse("sum by (le) (rate(router_gone_bucket{a='b'}[5m])) / 2"))
    assert selector.name == "router_gone_bucket" and selector.name not in scrape.labels
    assert list(grouped(promql.parse("1 - sum by (x) (a) / max by (y) (b)"))) == ["x", "y"]


def test_alerts_match_values_that_occur(scrape: Scrape) -> None:
    from router_ml.types import STATUSES

    reasons = {"cheapest", "most_probable", "default", "no_estimate"}
    assert scrape.labels["router_decisions_total"]["reason"] <= reasons
    known = {
        "reason": reasons,
        "status": set(STATUSES) | {"422"},
        "path": scrape.labels["router_responses_total"]["path"],
    }
    for where, text in expressions().items():
        for selector in selectors(promql.parse(text)):
            for matcher in selector.matchers.matchers:
                if matcher.name in known and matcher.value != "5..":
                    assert set(matcher.value.split("|")) <= known[matcher.name], where


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
        for label in re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])):
            kept = set(grouped(promql.parse(rule["expr"])))
            assert label in kept or (not kept and label in OF_THE_SCRAPE), f"{rule['alert']} shows {label}"
    tested = yaml.safe_load((DEPLOY / "prometheus" / "alerts.test.yaml").read_text(encoding="utf-8"))
    assert {case["alertname"] for test in tested["tests"] for case in test["alert_rule_test"]} <= set(names)


def test_the_dashboards_panels_do_not_overlap_and_have_their_own_ids() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def manifests() -> dict[str, dict[str, Any]]:
    """The manifests by their kind."""
    names = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    documents = [d for name in names for d in yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(p.name for p in KUBERNETES.glob("*.yaml") if p.name != "kustomization.yaml")
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def pod() -> dict[str, Any]:
    return dict(manifests()["Deployment"]["spec"]["template"]["spec"])


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return dict(only)


def instruction(name: str) -> list[str]:
    """The arguments of a Dockerfile's last instruction of this name, in exec form."""
    return list(json.loads(re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[-1]))


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_the_manifests_are_valid(version: str) -> None:
    for manifest in manifests().values():
        kubernetes_validate.validate(manifest, version, strict=True)
    broken = manifests()["Deployment"]
    broken["spec"]["template"]["spec"]["containers"][0]["livenes"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_arguments_are_options_that_serve_has() -> None:
    entry, command = instruction("ENTRYPOINT"), instruction("CMD")
    assert entry[:2] == ["router-ml", "serve"]
    for arguments in (command, container()["args"]):
        assert mistakes(" ".join([*entry, *arguments])) == []
    assert mistakes(" ".join([*entry, "--drain-second=1"])) != []
    assert "[project.scripts]\nrouter-ml = " in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_pieces_fit_each_other(scrape: Scrape) -> None:
    port = int(instruction("ENTRYPOINT")[instruction("ENTRYPOINT").index("--port") + 1])
    (named,) = container()["ports"]
    assert named["containerPort"] == port and f"EXPOSE {port}" in DOCKERFILE and f"'127.0.0.1', {port}" in DOCKERFILE
    (served,) = manifests()["Service"]["spec"]["ports"]
    assert served["targetPort"] == named["name"]
    labels = manifests()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    spec = {kind: manifest["spec"] for kind, manifest in manifests().items() if "spec" in manifest}
    assert spec["Service"]["selector"].items() <= labels.items()
    for kind, key in (
        ("Deployment", "selector"),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        assert spec[kind][key]["matchLabels"].items() <= labels.items()
    assert spec["HorizontalPodAutoscaler"]["scaleTargetRef"]["name"] == manifests()["Deployment"]["metadata"]["name"]
    assert "replicas" not in spec["Deployment"]  # the autoscaler's word would be overwritten at every apply
    mounted = {mount["name"]: mount for mount in container()["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod()["volumes"]}
    options = dict(argument.removeprefix("--").split("=", 1) for argument in container()["args"])
    for option in ("bundle", "policy"):
        mount = mounted[option]
        assert Path(options[option]).is_relative_to(mount["mountPath"]) and mount["readOnly"]
    assert Path(options["spool"]).is_relative_to(mounted["state"]["mountPath"])
    uid = pod()["securityContext"]["runAsUser"]
    assert f"USER {uid}:{uid}" in DOCKERFILE and f"-o {uid} -g {uid} {mounted['state']['mountPath']}" in DOCKERFILE


def test_probes_are_paths_of_the_service_and_the_end_has_time(tiny_bundle: Path, tmp_path: Path) -> None:
    probes = {name: container()[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}
    with running(tiny_bundle, tmp_path / "store.db", api_keys={"k": "0" * 64}) as live:
        for path in probes.values():
            assert live.http.get(path).is_success  # without a key: probes have none
    options = dict(argument.removeprefix("--").split("=", 1) for argument in container()["args"])
    drain, readiness = float(options["drain-seconds"]), container()["readinessProbe"]
    noticed = readiness["periodSeconds"] * readiness["failureThreshold"] + readiness["timeoutSeconds"]
    assert noticed < drain, "the port has to stay open until the last balancer has noticed"
    assert pod()["terminationGracePeriodSeconds"] >= drain + 10 + 3 + 10  # the store, the traces, requests in flight


def test_a_pod_is_confined() -> None:
    context = container()["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["securityContext"]["runAsNonRoot"] and not pod()["automountServiceAccountToken"]
    limits = container()["resources"]
    assert "memory" in limits["limits"] and {"cpu", "memory"} == limits["requests"].keys()
    secrets = [v for v in container()["env"] if re.search("KEY|STORE|PASSWORD|TOKEN", v["name"])]
    assert len(secrets) == 2 and all("secretKeyRef" in v["valueFrom"] for v in secrets)


def test_the_policy_of_the_manifests_loads() -> None:
    from router_ml.policy import Policy

    assert Policy.load(KUBERNETES / "policy.toml").exploration_rate > 0


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_gets_what_the_wheel_is_made_of_and_nothing_else(tmp_path: Path) -> None:
    """The wheel is built from what `COPY` brings, which the allow-list of .dockerignore has to let through."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [name for line in copied for name in line.split()]
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[1] == "*" and {line[1:] for line in ignore if line.startswith("!")} == set(sources)
    for name in sources:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, tmp_path / name)
    (build,) = re.findall(r"^RUN /opt/build/bin/pip (wheel .*) \.$", DOCKERFILE, re.MULTILINE)
    build = build.replace("/wheels", str(tmp_path / "wheels"))
    subprocess.run([sys.executable, "-m", "pip", *build.split(), "."], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert re.match(r"router_ml-[\d.]+-py3-none-any\.whl", wheel.name)
    assert f"{wheel.parent.name}/router_ml-*.whl" in DOCKERFILE


def test_the_image_has_the_extras_that_serving_in_a_cluster_needs_and_no_secret() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"\.whl\)\[([\w,]+)\]", DOCKERFILE)
    assert set(wanted.split(",")) == {"serve", "postgres", "otel"} <= extras.keys()
    assert not re.search(r"(?i)(password|token|secret|api_key)\s*=", DOCKERFILE)
    assert "-c requirements.lock" in DOCKERFILE
