// Releases: what has served and what the gate said, from the audit log; and the commands that promote and roll back.

import { h, table, when } from "./dom.js";
import { get } from "./http.js";

function what(change) {
  const a = change.after;
  if (change.kind !== "registry") return [h("code", null, a.model_version ?? ""), change.kind === "challenger" ? " loaded as challenger" : " serves"];
  const said = a.action === "rollback" ? `rolled back${a.automatic ? " by the watch" : ""}` : `promoted${a.forced ? ", the gate overruled" : ""}`;
  return [`${a.name ?? "router"} version ${a.version ?? "?"} ${said}`, a.before === null || a.before === undefined ? "" : `, before it ${a.before}`,
    a.failed ? h("div", { class: "worse" }, `failed: ${a.failed}`) : ""];
}

function gate(change) {
  const found = change.after.gate;
  if (!found) return change.kind === "registry" && change.after.action === "promote" ? "not judged" : "";
  const conditions = Object.entries(found.conditions ?? {});
  return h("details", null,
    h("summary", { class: found.passed ? "better" : "worse" }, found.passed ? "passed" : found.error ? "not judged" : "not passed"),
    found.error && h("p", null, found.error),
    h("ul", null, conditions.map(([name, c]) => h("li", { class: c.holds ? null : "worse" },
      `${c.holds ? "holds" : "fails"}: ${name}${c.value === null || c.value === undefined ? "" : ` (${Number(c.value.toPrecision(4))})`}`))));
}

export async function releasesView(me) {
  const { changes } = await get("/console/api/changes");
  const rows = changes.filter((each) => each.kind !== "policy").reverse();
  const name = (me.followed ?? "NAME").split("@")[0];
  const commands = [
    ["Is the challenger better?", `router-ml evaluate ${name} --store STORE --html report.html`],
    ["Promote it, if every condition of the gate holds", `router-ml promote ${name} --store STORE --reason WHY`],
    ["Back to the champion before", `router-ml rollback ${name} --store STORE --reason WHY`],
    ["All versions, with when, who and why", `router-ml history ${name}`],
  ];
  return h("div", null, h("h2", null, "Releases"),
    h("p", { class: "source" }, `Bundle ${me.model_version} serves${me.followed ? `, followed from ${me.followed}` : ", from a directory"}; from the audit log, as of ${when(me.time_us)}.`),
    table("What has served, the newest first", [
      ["time", (c) => when(c.time_us)], ["what", what], ["gate", gate], ["who", (c) => c.who], ["why", (c) => c.reason ?? c.after.reason ?? ""],
    ], rows, "nothing is noted yet"),
    h("h3", null, "Promote and roll back"),
    h("p", null, "The gate judges on the log, with the training programs, for minutes: it runs where these are, and this service loads neither. " +
      "A service that follows the alias serves the other version within a poll; this page then lists it."),
    table("Commands", [["to", ([title]) => title], ["give", ([, command]) => h("code", null, command)]], commands));
}
