// Releases: the registry's versions with what the gate said of them, promoted and rolled back from here; and what has served.

import { ask, change, complain, count, h, reasonField, say, table, usd, when } from "./dom.js";
import { get, post } from "./http.js";

const MINE = "router-ml-run"; // the promotion or rollback that this tab waits for: it outlives a reload
const GIVEN_UP = 3600e6; // microseconds: whatever is at work has ended by then
const number = (value) => (value === null || value === undefined ? "none" : String(Number(value.toPrecision(4))));
const known = (value, digits = 3) => (value === undefined ? "not known" : value.toFixed(digits));

function conditions(found, caption) {
  return table(caption, [
    ["condition", (c) => c.name],
    ["", (c) => h("span", { class: c.holds ? "better" : "worse" }, c.holds ? "holds" : "fails")],
    ["number", (c) => (c.value === null ? "not identifiable" : number(c.value)), true], ["limit", (c) => number(c.limit), true],
    ["in words", (c) => c.says ?? ""],
  ], found);
}

// The gate's conditions when a version was judged: with sentences where the report is kept, else the numbers of its tag.
function judged(version) {
  const tag = version.gate?.conditions && Object.entries(version.gate.conditions).map(([name, c]) => ({ name, limit: null, ...c }));
  return version.evaluation?.conditions ?? tag ?? [];
}

function gate(version) {
  const failed = judged(version).filter((c) => !c.holds).map((c) => c.name);
  const passed = judged(version).length ? !failed.length : version.metrics?.["evaluation/passed"] === undefined ? null : version.metrics["evaluation/passed"] > 0;
  if (passed === null) return "not judged";
  return h("span", { class: passed ? "better" : "worse" }, passed ? "passed" : `not passed${failed.length ? `: ${failed.join(", ")}` : ""}`);
}

function details(version) {
  const caption = `Conditions of the gate for version ${version.version}, judged ${when(version.evaluated_us ?? version.promoted)}`;
  const j = version.evaluation;
  return h("details", null, h("summary", null, caption),
    j && h("p", { class: "source" }, `On ${count(j.n)} requests with ${count(j.outcomes)} outcomes, ${when(j.oldest)} to ${when(j.newest)}; bundle ${j.challenger} against ${j.champion}.`),
    conditions(judged(version), caption));
}

function training(version) {
  const m = version.metrics ?? {};
  const kind = m["held_out/auc"] !== undefined ? ["held_out", `on ${count(m.held_out_requests)} held-out requests`]
    : m["out_of_fold/auc"] !== undefined ? ["out_of_fold", `out of fold, on ${count(m.train_outcomes)} outcomes`] : null;
  return kind === null ? "not known" : `AUC ${known(m[`${kind[0]}/auc`])}, calibration error ${known(m[`${kind[0]}/ece`])}, log loss ${known(m[`${kind[0]}/log_loss`])} ${kind[1]}`;
}

function evaluated(version) {
  const m = version.metrics ?? {};
  if (m["evaluation/passed"] === undefined) return "not judged";
  const of = (name) => (m[`evaluation/${name}/value`] === undefined ? null : ["value", "low", "high"].map((end) => m[`evaluation/${name}/${end}`]));
  const cost = of("cost_change");
  return [h("div", null, `quality ${change(of("quality_change"))}`),
    h("div", null, `cost a request ${cost ? `${cost[0] > 0 ? "+" : ""}${usd(cost[0])} (${usd(cost[1])} to ${usd(cost[2])})` : change(null)}`),
    h("div", { class: "note" }, `n ${count(m["evaluation/n"])} requests${version.evaluation ? `, ${count(version.evaluation.outcomes)} outcomes` : ""}, ${when(version.evaluated_us)}`)];
}

function reign(version) {
  const lines = [];
  if (version.promoted) lines.push(`promoted${version.forced ? ", the gate overruled," : ""} ${when(version.promoted)} by ${version.by}${version.reason ? `: ${version.reason}` : ""}`);
  if (version.rolled_back) lines.push(`rolled back ${when(version.rolled_back)} by ${version.rolled_back_by}: ${version.rolled_back_reason}`);
  else if (version.until) lines.push(`champion until ${when(version.until)}`);
  return lines.length ? lines.map((line) => h("div", null, line)) : "never";
}

function what(c) {
  const a = c.after;
  if (c.kind !== "registry") return [h("code", null, a.model_version ?? ""), c.kind === "challenger" ? " loaded as challenger" : " serves"];
  const wanted = a.action === "rollback";
  if (a.asked) return `${wanted ? "the rollback" : "the promotion"} of ${a.name ?? "router"} version ${a.version ?? "?"} was asked for`;
  const done = wanted ? `rolled back to${a.automatic ? " by the watch" : ""}` : `promoted${a.forced ? ", the gate overruled" : ""}`;
  const tried = wanted ? "was to be rolled back" : "was to be promoted";
  return [`${a.name ?? "router"} version ${a.version ?? "?"} ${a.failed ? tried : done}${a.before === null || a.before === undefined ? "" : `; champion before: ${a.before}`}`,
    a.failed ? h("div", { class: "worse" }, `${a.unsure ? "It may not have come to pass" : "It did not come to pass"}: ${a.failed}`) : ""];
}

function audited(c) {
  const found = c.after.gate;
  if (c.after.asked) return "";
  if (!found) return c.kind === "registry" && c.after.action === "promote" ? "not judged" : "";
  const each = Object.entries(found.conditions ?? {});
  return h("details", null,
    h("summary", { class: found.passed ? "better" : "worse" }, found.passed ? "passed" : found.error ? "not judged" : "not passed"),
    found.error && h("p", null, found.error),
    h("ul", null, each.map(([name, one]) => h("li", { class: one.holds ? null : "worse" },
      `${one.holds ? "holds" : "fails"}: ${name}${one.value === null || one.value === undefined ? "" : ` (${number(one.value)})`}`))));
}

function commands(name) {
  return table("The same as commands, where training is installed", [["to", ([title]) => title], ["give", ([, command]) => h("code", null, command)]], [
    ["Is the challenger better?", `router-ml evaluate ${name} --store STORE --html report.html`],
    ["Promote it, if every condition of the gate holds", `router-ml promote ${name} --store STORE --reason WHY`],
    ["Back to the champion before", `router-ml rollback ${name} --store STORE --reason WHY`],
    ["All versions, with when, who and why", `router-ml history ${name}`],
  ]);
}

const doing = (run) => (run.action === "promote" ? `Promotion of version ${run.version}` : `Rollback of version ${run.version}`);

function waitedFor() {
  try {
    return JSON.parse(sessionStorage.getItem(MINE));
  } catch {
    return null;
  }
}

// What the audit log has of a run's end: its own note, or that of the command that has moved the champion.
function noted(run, changes) {
  return changes.find((c) => c.kind === "registry" && !c.after.asked && (c.after.id === run.id || (!c.after.failed && c.time_us >= run.started_us &&
    c.after.action === run.action && String(c.after.version) === run.version && (c.reason ?? c.after.reason) === run.reason)));
}

function ended(run, release) {
  const how = { done: "", refused: "The gate refuses it: ", failed: run.moving ? "It may not have come to pass: " : "It did not come to pass: " }[run.state];
  const follows = run.state === "done" && release.followed?.split("@")[1] === release.champion_alias;
  const serves = !follows ? "" : release.served_version === run.result.version ? ` This service serves it: bundle ${release.served_bundle}.`
    : ` This service still serves version ${release.served_version}, and is fetching the other one.`;
  return [`${how}${run.says}.${serves}`, follows && release.served_version !== run.result.version];
}

// Shows the run that is at work, or was the last, and asks on while there is something to come; `changed` is told of its end.
function runPanel(changed) {
  const heading = h("h3", { tabindex: "-1" });
  const stage = h("p", { role: "status" });
  const rest = h("div");
  const element = h("section", { id: "run", class: "apply", "aria-label": "Promotion or rollback", hidden: true }, heading, stage, rest);
  let told = null;
  let asked = 0;
  let misses = 0; // answers in a row, of a process that does not know the run that is waited for

  function text(node, value) {
    if (node.textContent !== value) node.textContent = value; // a live region speaks at every change
  }

  // The process that answers has had another run since, or none: the audit log, which all processes share, may tell of mine.
  function elsewhere(release, mine, changes) {
    const end = noted(mine, changes);
    misses += 1;
    if (!end && misses < 3 && release.time_us - mine.started_us < GIVEN_UP) return true;
    element.hidden = false;
    text(heading, doing(mine));
    rest.replaceChildren();
    const after = release.run && release.run.started_us > mine.started_us
      ? ` ${doing(release.run)}, which ${release.run.who} asked for, has followed.` : "";
    if (end) {
      text(stage, `${end.after.failed ? `It did not come to pass: ${end.after.failed}` : "It has come to pass, as the audit log below says"}.${after}`);
      stage.className = end.after.failed ? "worse" : "better";
    } else {
      text(stage, "The process that answers does not know of it: another process of the service may be at it, or the service was restarted meanwhile, " +
        `which ends it. The versions and the audit log below tell whether the champion has moved.${after}`);
      stage.className = "";
    }
    const over = Boolean(end) || release.time_us - mine.started_us >= GIVEN_UP;
    if (over) sessionStorage.removeItem(MINE);
    if (over || misses === 3) changed(release);
    return !over;
  }

  function show(release, changes) {
    const { run } = release;
    const waited = waitedFor();
    const mine = waited?.id ?? null;
    if (mine !== null && run?.id !== mine) return elsewhere(release, waited, changes);
    misses = 0;
    if (!run) return false;
    element.hidden = false;
    text(heading, doing(run));
    const asked_by = `Asked for by ${run.who}, ${when(run.started_us)}: ${run.reason}`;
    if (run.state === "running") {
      text(stage, `At work: ${run.stage}.`);
      rest.replaceChildren(h("progress", { "aria-label": doing(run) }),
        h("p", { class: "note" }, `${asked_by}. ${count((release.time_us - run.started_us) / 1e6)} s so far.`));
      return true;
    }
    const [said, coming] = ended(run, release);
    text(stage, said);
    stage.className = run.state === "done" ? "better" : "worse";
    if (told !== run.id) {
      told = run.id;
      const j = run.result.judged;
      const lost = document.activeElement === document.body || document.getElementById("versions")?.contains(document.activeElement);
      rest.replaceChildren(...[h("p", { class: "note" }, `${asked_by}. Ended ${when(run.ended_us)}.`),
        j && h("p", { class: "source" }, `Judged off-policy (doubly robust) on ${count(j.n)} of ${count(j.considered)} requests with ${count(j.outcomes)} outcomes, ` +
          `${when(j.oldest)} to ${when(j.newest)}: bundle ${j.challenger} against ${j.champion}, under policy ${[...new Set(j.policies_in_force)].join(" and ")}, ` +
          `from ${release.judged_by}. Intervals: ${count(100 * j.confidence)} %. ${j.notes.map((note) => `Note: ${note}.`).join(" ")}`),
        run.result.conditions?.length > 0 && conditions(run.result.conditions, "Conditions of the gate")].filter(Boolean));
      if (mine === run.id && lost) heading.focus();
      if (mine === run.id) say("");
      changed(release);
    }
    if (!coming && mine !== null) {
      sessionStorage.removeItem(MINE);
      changed(release);
    }
    return coming && sessionStorage.getItem(MINE) !== null;
  }

  async function follow(release) {
    const turn = (asked += 1);
    misses = 0;
    const look = async (now) => {
      const mine = waitedFor();
      const changes = mine && now.run?.id !== mine.id ? (await get("/console/api/changes")).changes : [];
      return turn === asked && show(now, changes);
    };
    let [more, next] = [true, release];
    while (more && turn === asked) {
      try {
        more = await look(next ?? await get("/console/api/releases"));
      } catch (problem) {
        text(stage, `${problem.message}; it is asked on.`);
        if (problem.status === 401 || problem.status === 403) return;
      }
      if (!more || turn !== asked) break;
      next = null;
      await new Promise((wait) => { setTimeout(wait, misses < 3 ? 500 : 2000); });
      if (!element.isConnected) return;
    }
    document.getElementById("served").dispatchEvent(new Event("refresh"));
  }
  return { element, follow };
}

export async function releasesView(me) {
  const [release, { changes }] = await Promise.all([get("/console/api/releases"), get("/console/api/changes")]);
  const versions = h("div", { id: "versions" });
  const past = h("div", { id: "past" });
  const source = h("p", { class: "source" });
  const panel = runPanel((now) => { tell(now); load(); audit().catch((problem) => complain(`${problem.message}.`)); });

  function tell(now) {
    source.replaceChildren(`Bundle ${now.served_bundle} serves${me.followed ? `, version ${now.served_version} of ${me.followed}` : ", from a directory"}; as of ${when(now.time_us)}.` +
      `${now.problem ? ` The registry: ${now.problem}.` : ""}`);
  }

  async function move(action, version) {
    const back = action === "rollback";
    const reason = reasonField("It stands in the audit log and with the version, at most 500 characters.");
    const sure = await ask(back ? `Roll back version ${version}?` : `Promote version ${version}?`, [
      h("p", null, back ? "The version that was champion before becomes it again, at once and without the gate. This version is not promoted again unless the gate is overruled."
        : `It is compared with the champion on ${release.judged_by}, which takes minutes. It becomes champion only if every condition of the gate holds.`),
      reason.element], back ? "Roll back" : "Judge and promote", reason.problem);
    if (!sure) return;
    try {
      const { run } = await post(`/console/api/releases/${action}`, { version, reason: reason.value() });
      sessionStorage.setItem(MINE, JSON.stringify(run));
      say(`${doing(run)} has begun.`);
      panel.follow({ ...release, run, time_us: run.started_us });
    } catch (problem) {
      complain(problem.status === 0 ? "Whether it has begun is not known: the service does not answer. Load this page again to see."
        : `Not begun: ${problem.message}.`);
    }
  }

  function button(v) {
    if (!me.may_release) return "";
    if (v.aliases.includes(release.champion_alias)) return h("button", { type: "button", onclick: () => move("rollback", v.version) }, "Roll back…");
    return v.aliases.includes("challenger") ? h("button", { type: "button", onclick: () => move("promote", v.version) }, "Promote…") : "";
  }

  async function load() {
    if (release.why_not) return;
    let found;
    try {
      found = await get("/console/api/releases/versions");
    } catch (problem) {
      versions.replaceChildren(h("p", { class: "warning" }, `${problem.message}.`), commands(release.name));
      return;
    }
    versions.replaceChildren(table(`Versions of ${release.name} in the registry ${release.registry}, the newest first; as of ${when(found.time_us)}`, [
      ["version", (v) => [v.version, ...v.aliases.map((alias) => h("div", null, h("strong", null, alias)))]],
      ["bundle", (v) => h("code", null, v.bundle ?? "not known")], ["registered", (v) => (v.created_us ? when(v.created_us) : "not looked up")],
      ["", button],
      ["training said", training], ["against the champion of that time", evaluated], ["gate", gate], ["champion", reign],
    ], found.versions, "none is registered"),
      ...found.versions.filter((v) => judged(v).length && (v.evaluated_us ?? v.promoted)).map(details),
      h("p", { class: "note" }, me.may_release ? "Only the challenger can be promoted from here: point that alias to another version to have it judged."
        : "This key may read and not change: to promote and to roll back takes one of the scope admin."));
  }

  function history(rows) {
    past.replaceChildren(table("What has served and what was tried, from the audit log, the newest first", [
      ["time", (c) => when(c.time_us)], ["what", what], ["gate", audited], ["who", (c) => c.who], ["why", (c) => c.reason ?? c.after.reason ?? ""],
    ], rows.filter((each) => each.kind !== "policy").reverse(), "nothing is noted yet"));
  }

  const audit = async () => history((await get("/console/api/changes")).changes);
  history(changes);
  versions.replaceChildren(release.why_not ? h("div", null, h("p", { class: "warning", id: "why-not" }, `Versions are not shown: ${release.why_not}.`), commands(release.name ?? "NAME"))
    : h("p", { class: "note" }, "Asking the registry, which takes some seconds…"));
  tell(release);
  const shown = h("div", null, h("h2", null, "Releases"), source, panel.element, versions, past);
  setTimeout(() => { load(); panel.follow(release); });
  return shown;
}
