// Savings: sums of whole nano-dollars (as BigInt, exact at any size), so that any grouping adds up to the total; and the same as CSV.

import { count, field, h, nano, say, share, svg, table, when } from "./dom.js";
import { get } from "./http.js";

const GROUPS = ["tenant", "task", "day", "model"];
const SUMS = ["calls", "reported", "priced", "open", "cost_nano", "open_expected_nano", "compared", "compared_cost_nano", "baseline_nano", "savings_nano"];
const money = (name) => name.endsWith("_nano");
const ZERO = Object.fromEntries(SUMS.map((name) => [name, money(name) ? 0n : 0]));

export function grouped(found, by) {
  const at = Object.fromEntries(found.columns.map((name, i) => [name, i]));
  const groups = new Map();
  for (const row of found.rows) {
    const name = by === null ? "together" : row[at[by]] ?? "(none)";
    const into = groups.get(name) ?? { name, ...ZERO };
    for (const sum of SUMS) into[sum] += money(sum) ? BigInt(row[at[sum]]) : row[at[sum]];
    groups.set(name, into);
  }
  const made = [...groups.values()];
  return by === "day" ? made.sort((a, b) => a.name.localeCompare(b.name)) : made.sort((a, b) => Number(b.cost_nano - a.cost_nano));
}

// A text that a spreadsheet would take for a formula, also behind blanks and quotes, is told from one by an apostrophe; all
// texts are quoted, since where ";" separates cells, one in a name would begin a cell of its own.
function cell(value) {
  const text = String(value).replace(/^(?=[\s"']*[=+\-@\t\r\uFF1D\uFF0B\uFF0D\uFF20])/, "'");
  return `"${text.replaceAll('"', '""')}"`;
}

function dollars(value) {
  const digits = String(value < 0n ? -value : value).padStart(10, "0");
  return `${value < 0n ? "-" : ""}${digits.slice(0, -9)}.${digits.slice(-9)}`;
}

export function csv(rows, by, found) {
  const names = SUMS.map((name) => name.replace("_nano", "_usd"));
  const lines = rows.map((row) => [cell(row.name), ...SUMS.map((name) => (money(name) ? dollars(row[name]) : row[name]))]);
  const head = [by, ...names, "baseline", "since", "made"].map(cell);
  const source = [found.baseline ?? "", when(found.since_us), when(found.made_us)].map(cell);
  return `${[head, ...lines.map((line) => [...line, ...source])].map((line) => line.join(",")).join("\r\n")}\r\n`;
}

function bars(rows) {
  const [W, H] = [640, 160];
  const most = Math.max(...rows.map((row) => Number(row.cost_nano)), 1);
  const wide = (W - 60) / rows.length;
  return h("figure", null,
    svg("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Cost a day; the table holds the same" },
      rows.map((row, i) => {
        const tall = (H - 40) * Number(row.cost_nano) / most;
        return svg("rect", { class: "bar", x: 56 + i * wide + 1, y: H - 24 - tall, width: Math.max(wide - 2, 1), height: tall });
      }),
      svg("text", { x: 50, y: 20, "text-anchor": "end" }, nano(most).replace(" USD", "")), svg("text", { x: 50, y: H - 24, "text-anchor": "end" }, "0"),
      svg("text", { x: 56, y: H - 6 }, rows[0].name), svg("text", { x: W, y: H - 6, "text-anchor": "end" }, rows.at(-1).name)),
    h("figcaption", null, "Cost a day in USD, reported or priced by tokens; open calls are not in it."));
}

export async function savingsView() {
  const { models } = await get("/console/api/models");
  const days = h("select", { id: "days" }, [1, 7, 30, 90, 366].map((n) => h("option", { value: n }, `${n} ${n === 1 ? "day" : "days"}`)));
  days.value = "30";
  const by = h("select", { id: "by" }, GROUPS.map((name) => h("option", { value: name }, name)));
  const baseline = h("select", { id: "baseline" }, h("option", { value: "" }, "the best of the training log"), models.map((m) => h("option", { value: m.id }, m.id)));
  const shown = h("div", { id: "sums" });
  let found = null; // the sums of the controls as they stand; null while they are being made, and where they cannot be had
  let turn = 0;

  function show() {
    if (found === null) return;
    const rows = grouped(found, by.value);
    const [all] = grouped(found, null);
    const part = (row) => (row.compared ? `${nano(row.savings_nano)}${row.baseline_nano ? ` (${share(Number(row.savings_nano) / Number(row.baseline_nano))})` : ""}` : "nothing to compare");
    const total = all ?? ZERO;
    shown.replaceChildren(
      h("p", { class: "source" }, `From the service's store: decisions since ${when(found.since_us)}, as of ${when(found.made_us)}. ${count(total.calls)} calls: ` +
        `${count(total.reported)} with a reported cost, ${count(total.priced)} priced by their tokens, ${count(total.open)} open (of which nothing is known yet, ` +
        `expected ${nano(total.open_expected_nano)}). Baseline ${found.baseline ?? "none"}: the same tokens at its card's prices, or what the router expected of it; ` +
        `compared on ${count(total.compared)} calls. Sums are exact; they are no estimate and have no interval.`),
      by.value === "day" && rows.length ? bars(rows) : "",
      table(`Savings by ${by.value}`, [
        [by.value, (r) => r.name], ["calls", (r) => count(r.calls), true], ["open", (r) => count(r.open), true], ["cost", (r) => nano(r.cost_nano), true],
        ["baseline", (r) => (r.compared ? nano(r.baseline_nano) : "nothing to compare"), true], ["saved", part, true], ["compared", (r) => count(r.compared), true],
      ], [...rows, ...(rows.length ? [{ ...total, name: "together" }] : [])], "no calls in this time"));
  }

  async function load() {
    const mine = (turn += 1);
    found = null;
    save.disabled = true;
    shown.replaceChildren(h("p", null, "Adding up…"));
    say("Adding up…");
    let sums;
    try {
      sums = await get("/console/api/sums", { days: days.value, baseline: baseline.value });
    } catch (problem) {
      if (mine !== turn) return; // it is of a question that another has followed
      throw problem;
    }
    if (mine !== turn) return;
    found = sums;
    save.disabled = false;
    show();
    say("");
  }

  const save = h("button", { type: "button", id: "csv", onclick: () => {
    const url = URL.createObjectURL(new Blob([csv(grouped(found, by.value), by.value, found)], { type: "text/csv" }));
    h("a", { href: url, download: `savings-by-${by.value}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  } }, "Export as CSV");
  const reload = () => load().catch((problem) => { say(""); shown.replaceChildren(h("p", { class: "warning" }, `${problem.message}.`)); });
  days.addEventListener("change", reload);
  baseline.addEventListener("change", reload);
  by.addEventListener("change", show);
  await load();
  return h("div", null, h("h2", null, "Savings"),
    h("div", { class: "controls" }, field("Time", days), field("By", by), field("Against", baseline), save), shown);
}
