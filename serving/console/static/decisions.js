// Decisions: search the store, and one of them explained.

import { complain, count, field, h, say, share, table, usd, when } from "./dom.js";
import { get } from "./http.js";

const FIELDS = [["id", "Decision or request id (its beginning)"], ["tenant", "Tenant"], ["task", "Task"], ["model", "Model"], ["tier", "Tier"],
  ["key", "Key"], ["session", "Session"]];
const p = (value) => (value === null || value === undefined ? "not known" : value.toFixed(3));

function line(d) {
  return [["decision", h("a", { href: `#/decisions/${encodeURIComponent(d.decision_id)}` }, h("code", null, d.decision_id.slice(0, 12)))], ["time", when(d.time_us)]];
}

export async function decisionsView(me, [id]) {
  return id ? one(id) : search(me);
}

function search(me) {
  const inputs = FIELDS.map(([name, label]) => [name, label, h("input", { id: `by-${name}`, autocomplete: "off" })]);
  if (me.prompts === "text") inputs.push(["text", "Words in the prompt", h("input", { id: "by-text", autocomplete: "off" })]);
  const flags = [["explored", "explored"], ["missed", "no model met the dial"]].map(([name, label]) => [name, label, h("input", { id: `by-${name}`, type: "checkbox" })]);
  const found = h("div", { id: "found" });
  const query = () => Object.fromEntries([...inputs.map(([name, , input]) => [name, input.value.trim()]),
    ...flags.map(([name, , input]) => [name, input.checked ? "1" : ""])]);

  const told = (asked) => [...inputs.filter(([name]) => asked[name]).map(([name, label]) => `${label} "${asked[name]}"`),
    ...flags.filter(([name]) => asked[name]).map(([, label]) => label)].join(", ");
  let turn = 0; // a slow answer is not shown over that of a later question

  async function go(...page) {
    const mine = turn + 1;
    try {
      const [all, which] = await show(...page);
      if (mine !== turn) return;
      if (document.activeElement === document.body) found.querySelector(".scroll").focus(); // the button that was pressed is gone
      say(`${all}${which}.`);
    } catch (problem) {
      if (mine === turn) complain(`${problem.message}.`);
    }
  }

  // `asked` is the filter as it was when Search was pressed: what is in the fields may have been edited since.
  async function show(asked, after, before = []) {
    const mine = (turn += 1);
    const page = await get("/console/api/decisions", { ...asked, after });
    if (mine !== turn) return [];
    const from = before.length * 50;
    const total = from + page.total; // the service counts from where the page begins
    const all = `${count(total)} ${total === 1 ? "decision" : "decisions"}`;
    const which = page.decisions.length ? `, ${count(from + 1)} to ${count(from + page.decisions.length)}` : "";
    const filter = told(asked);
    found.replaceChildren(
      table(`${all} in the service's store${which}, the newest first; as of ${when(Date.now() * 1000)}${filter && `; searched for: ${filter}`}`, [
        ["decision", (d) => line(d)[0][1]], ["time", (d) => line(d)[1][1]],
        ["tenant", (d) => d.tenant ?? ""], ["task", (d) => d.task ?? ""], ["tier", (d) => d.tier ?? ""], ["model", (d) => d.model],
        ["expected cost", (d) => usd(d.expected_cost_usd), true], ["dial", (d) => String(d.min_probability), true],
        ["reason", (d) => d.reason], ["policy", (d) => h("code", null, d.policy_version)],
      ], page.decisions, "no decision matches"),
      h("p", null,
        before.length > 0 && h("button", { type: "button", onclick: () => go(asked, before.at(-1), before.slice(0, -1)) }, "Newer"), " ",
        page.after && h("button", { type: "button", id: "older", onclick: () => go(asked, page.after, [...before, after]) }, "Older")));
    return [all, which];
  }

  const form = h("form", { class: "controls", onsubmit: (event) => { event.preventDefault(); go(query(), null); } },
    inputs.map(([, label, input]) => field(label, input)), flags.map(([, label, input]) => h("div", null, h("span", null, input, " ", h("label", { for: input.id }, label)))),
    h("button", { class: "primary" }, "Search"));
  return show(query(), null).then(() => h("div", null, h("h2", null, "Decisions"), form, found));
}

function message(text) {
  return h("div", { class: "text", tabindex: "0", role: "region", "aria-label": "Text of the request" }, text);
}

async function one(id) {
  const { decision: d, outcomes, explanation, note } = await get(`/console/api/decisions/${encodeURIComponent(id)}`);
  const facts = [["time", when(d.time_us)], ["model", `${d.model} (${d.provider})`], ["reason", d.reason], ["tenant", d.tenant], ["task", d.task], ["key", d.key],
    ["session", d.session], ["tier", d.tier], ["least probability", d.min_probability], ["met", d.meets_threshold ? "yes" : "no"],
    ["explored", d.explored ? "yes" : "no"], ["propensity", p(d.propensity)], ["data class", d.data_class], ["region", d.region],
    ["bundle", d.model_version], ["policy", d.policy_version]].filter(([, value]) => value !== null && value !== undefined);
  const text = d.prompt ?? d.messages;
  const excluded = Object.entries(d.excluded ?? {});
  return h("div", null,
    h("p", null, h("a", { href: "#/decisions" }, "All decisions")),
    h("h2", null, "Decision ", h("code", null, d.decision_id)),
    h("p", { class: "source" }, "From the service's store, as it was recorded."),
    h("dl", { class: "numbers" }, facts.map(([name, value]) => [h("dt", null, name), h("dd", null, String(value))])),
    table("Candidates in the order in which they are tried", [
      ["model", (c) => c.model], ["P(ok)", (c) => p(c.p_ok), true], ["expected cost", (c) => usd(c.expected_cost_usd), true],
      ["with what follows a failure", (c) => usd(c.expected_total_cost_usd), true]], d.candidates),
    table("Excluded, and why", [["model", ([model]) => model], ["why", ([, why]) => why]], excluded, "none"),
    table("Outcomes reported", [["time", (o) => when(o.time_us)], ["status", (o) => o.status ?? ""], ["served by", (o) => o.served_model ?? ""],
      ["cost", (o) => (o.cost_usd === null ? "" : usd(o.cost_usd)), true], ["latency, ms", (o) => (o.latency_ms === null ? "" : count(o.latency_ms)), true],
      ["quality", (o) => (o.quality === null ? "" : String(o.quality)), true], ["says", (o) => o.quality_source ?? ""]], outcomes, "none so far"),
    h("h3", null, "Why these probabilities"),
    note && h("p", { class: "note" }, note),
    explanation && explanation.candidates.map((c) => h("details", null,
      h("summary", null, `${c.model}: P(ok) ${p(c.p_ok)}, ${p(c.p_low)} to ${p(c.p_high)} (90 %), stands for ${p(c.p_claim)}`),
      table("What the booster adds to its average, in log odds (SHAP)", [["feature", (f) => f.feature], ["value", (f) => p(f.value), true],
        ["log odds", (f) => p(f.log_odds), true]], c.contributions ?? [], "nothing"))),
    h("h3", null, "The request"),
    text === null || text === undefined ? h("p", { class: "note" }, "Its text is not stored (--store-prompts).") : message(text),
    h("p", { class: "note" }, `Propensity ${share(d.propensity)}: how probably the policy chose this model for it.`));
}
