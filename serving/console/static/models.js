// Models: prices, health, what was served and spent, and whether what was promised of each came true.

import { change, count, h, nano, share, table, when } from "./dom.js";
import { get } from "./http.js";
import { grouped } from "./savings.js";

const price = (value) => (value === null || value === undefined ? "not known" : `${value}`);

function drifted(row) {
  if (!row?.older || !row?.newer) return "too few outcomes";
  const apart = row.newer[2] < row.older[1] || row.newer[1] > row.older[2];
  const said = `${change(row.older)} → ${change(row.newer)}`;
  return apart ? h("span", { class: "worse" }, `${said}: has moved`) : said;
}

export async function modelsView() {
  const adding = get("/console/api/sums", { days: "30" }).catch((problem) => problem);
  const found = await get("/console/api/models");
  const sums = await adding;
  const away = sums instanceof Error;
  return h("div", null, h("h2", null, "Models"),
    h("p", { class: "source" }, `The catalogue of bundle ${found.model_version}, which serves; circuits as of ${when(found.time_us)}.`),
    table("Prices, health and who may use it", [
      ["model", (m) => m.id], ["provider", (m) => m.provider], ["tier", (m) => m.tier],
      ["input, USD a million tokens", (m) => price(m.input_usd_per_mtok), true],
      ["cached input, USD a million tokens", (m) => price(m.cached_input_usd_per_mtok), true],
      ["output, USD a million tokens", (m) => price(m.output_usd_per_mtok), true],
      ["health", (m) => (m.down ? h("span", { class: "worse" }, `circuit ${m.circuit}: ${m.down}`) : `serves (circuit ${m.circuit})`)],
      ["data classes", (m) => (m.data_classes ?? ["public"]).join(", ")], ["regions", (m) => (m.regions ?? []).join(", ")],
      ["keys that may not", (m) => m.not_for_keys.join(", ") || "none"],
    ], found.models),
    away ? h("p", { class: "warning" }, `Share, spend, calibration and drift are not known: ${sums.message}.`) : served(found, sums));
}

// What the store tells of them.
function served(found, sums) {
  const spent = new Map(grouped(sums, "model").map((row) => [row.name, row]));
  const calls = [...spent.values()].reduce((sum, row) => sum + row.calls, 0);
  const promised = new Map(sums.promises.map((row) => [row.model, row]));
  const own = new Set(found.models.map((card) => card.id));
  const gone = [...spent.values()].filter((row) => !own.has(row.name));
  return [
    h("p", { class: "source" }, `From the service's store: decisions since ${when(sums.since_us)}, as of ${when(sums.made_us)}; n ${count(calls)} calls.`),
    table("Share and spend", [
      ["model", (m) => m.id ?? m.name], ["calls", (m) => count(spent.get(m.id ?? m.name)?.calls ?? 0), true],
      ["share", (m) => (calls ? share((spent.get(m.id ?? m.name)?.calls ?? 0) / calls) : "no calls"), true],
      ["spend, known", (m) => nano(spent.get(m.id ?? m.name)?.cost_nano ?? 0), true],
      ["open calls", (m) => count(spent.get(m.id ?? m.name)?.open ?? 0), true],
      ["expected of these", (m) => nano(spent.get(m.id ?? m.name)?.open_expected_nano ?? 0), true],
    ], [...found.models, ...gone]),
    table(`Calibration and drift of bundle ${found.model_version}: acceptable answers (quality of at least ${sums.threshold}) less P(ok), as feedback has it; 95 %, sessions drawn whole`, [
      ["model", (m) => m.id], ["n", (m) => count(promised.get(m.id)?.n ?? 0), true],
      ["P(ok)", (m) => (promised.has(m.id) ? promised.get(m.id).p_ok.toFixed(3) : ""), true],
      ["acceptable", (m) => (promised.has(m.id) ? promised.get(m.id).ok.toFixed(3) : ""), true],
      ["difference", (m) => (promised.get(m.id)?.residual ? change(promised.get(m.id).residual) : "too few outcomes"), true],
      ["older half → newer half", (m) => drifted(promised.get(m.id)), true],
    ], found.models),
  ];
}
