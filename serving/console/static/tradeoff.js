// Trade-off: all settings are in the file; moving the dial only shows another one.

import { against, settingOf } from "./against.js";
import { applyPanel } from "./apply.js";
import { change, count, field, h, NOT_IDENTIFIABLE, quality, share, signed, table, usd, when } from "./dom.js";
import { frontier, narrow, settingText } from "./frontier.js";
import { get, policyInForce } from "./http.js";

const MOST_SHOWN = 12;

function sourceLines(found) {
  const { tradeoff: t, file, warnings } = found;
  const s = t.source;
  return [
    h("p", { class: "source" },
      `Judged off-policy (${s.estimator}) on ${count(s.judged)} of ${count(s.considered)} requests with ${count(s.outcomes)} outcomes, ` +
      `${when(s.oldest)} to ${when(s.newest)}; bundle ${t.model_version}, policy ${t.policy_version}; each interval ${share(t.confidence)} by ` +
      `itself, those of the slices together. Made ${when(t.made)}, from ${file}.`),
    s.notes.map((note) => h("p", { class: "source" }, `Note: ${note}.`)),
    warnings.map((warning) => h("p", { class: "warning" }, `Attention: ${warning}.`)),
  ];
}

function costAMonth(level, volume) {
  const found = level.cost_usd;
  if (!found) return `${NOT_IDENTIFIABLE}: ${level.why.cost_usd ?? ""}`;
  const [value, low, high] = found.map((each) => usd(each * volume));
  return [h("strong", null, value), ` (${low} to ${high})`];
}

// Cost a month of a change as (value, low, high).
const costs = (change, volume) => (change ? `${change[0] > 0 ? "+" : ""}${usd(change[0] * volume)} (${usd(change[1] * volume)} to ${usd(change[2] * volume)})` : NOT_IDENTIFIABLE);

// What a setting changes against the one in force (`held`), on the tier's rows; of a task the part that is its own.
function changes(t, scope, tier, at, live, held, volume) {
  const base = live === tier.today ? `today (${t.settings[live]} when it was judged)`
    : `what is in force (${live < 0 ? "a setting that was not judged" : `${t.settings[live]}; both were judged against ${t.settings[tier.today]}`})`;
  const made = tier.changes[at];
  const elsewhere = live === tier.today ? `; ${share(made.changed)} of the requests would go to another model` : "";
  const per = volume * t.scopes[tier.scope].n / scope.n; // the volume is the scope's, the change the tier's
  const rows = [[`Against ${base}, ${tier.rows}`, `quality ${change(held.quality)}; cost a month ${costs(held.cost_usd, per)}${elsewhere}`]];
  if (scope.by === "task") {
    const own = held.slices.find((s) => s.by === "task" && s.name === scope.name);
    const who = live === tier.today && made.who.find((w) => w.by === "task" && w.name === scope.name);
    rows.push([`The same, of task ${scope.name} alone${own ? ` (n ${count(own.n)})` : ""}`, [
      own ? `quality ${change(own.quality)}, together with all other slices` : at === live ? "no change" : `${NOT_IDENTIFIABLE} by itself`,
      who ? `; ${share(who.changed)} of its requests would go to another model` : ""]]);
  }
  return rows;
}

function numbers(t, scope, tier, at, volume, live, held) {
  const level = scope.settings[at];
  const latency = level.latency_ms ? `${level.latency_ms.map((v) => count(v))[0]} ms (${count(level.latency_ms[1])} to ${count(level.latency_ms[2])})`
    : `${NOT_IDENTIFIABLE}: ${level.why.latency_ms ?? ""}`;
  const rows = [
    ["Least probability", h("strong", null, String(t.settings[at]))],
    ["Cost a month", costAMonth(level, volume)],
    ["Quality a request", level.quality ? h("strong", null, quality(level.quality)) : `${NOT_IDENTIFIABLE}: ${level.why.quality ?? ""}`],
    ["Mean latency of a call", latency],
    ["Judged on", `${count(scope.n)} requests, ${count(scope.outcomes)} outcomes`],
  ];
  if (held) rows.push(...changes(t, scope, tier, at, live, held, volume));
  return h("dl", { class: "numbers" }, rows.map(([name, what]) => [h("dt", null, name), h("dd", null, what)]));
}

function shares(t, scope, tier, at) {
  const now = tier.today === null ? null : scope.settings[tier.today].shares;
  const rows = t.models.map((model, i) => ({ model, share: scope.settings[at].shares[i], today: now && now[i] }))
    .filter((row) => row.share > 0.0005 || row.today > 0.0005);
  return table("Share of requests by model; exact for the judged requests, exploration included", [
    ["model", (r) => r.model],
    ["share", (r) => share(r.share), true],
    ["", (r) => h("meter", { min: 0, max: 1, value: r.share, "aria-label": `${r.model} ${share(r.share)}` })],
    ["today", (r) => (r.today === null ? "" : share(r.today)), true],
  ], rows);
}

function slices(made) {
  const known = made.slices.filter((s) => s.quality);
  const worse = known.filter((s) => s.quality[0] < 0).sort((a, b) => a.quality[2] - b.quality[2]);
  const unknown = made.slices.filter((s) => !s.quality);
  const said = (s) => (s.quality[2] < 0 ? h("span", { class: "worse" }, "shown to be worse") : "may be worse: 0 is within");
  return [
    table("Slices that get worse: change of quality against what is in force, all intervals hold together", [
      ["slice", (s) => `${s.by}: ${s.name}`],
      ["change", (s) => change(s.quality), true],
      ["n", (s) => count(s.n), true],
      ["", said],
    ], worse.slice(0, MOST_SHOWN), "none of those that can be judged"),
    unknown.length > 0 && h("p", { class: "note" }, `${NOT_IDENTIFIABLE} for ${unknown.map((s) => `${s.by}: ${s.name} (n ${count(s.n)})`).join(", ")}.`),
  ];
}

function moved(made, examples) {
  const p = (value) => (value === null ? "not known" : value.toFixed(2));
  const shown = made.examples.map((e) => ({ ...e, ...examples[e.example] }));
  return [
    table("What would change: requests that go to another model, by what the router expects", [
      ["from", (m) => m.from], ["to", (m) => m.to], ["n", (m) => count(m.n), true],
      ["cost a request", (m) => `${usd(m.cost_usd_before)} → ${usd(m.cost_usd_after)}`, true],
      ["P(ok)", (m) => `${p(m.p_ok_before)} → ${p(m.p_ok_after)}`, true],
      ["tasks", (m) => m.tasks.join(", ")],
    ], made.moves, "nothing"),
    table("For whom: share of requests that go to another model", [
      ["whose", (w) => `${w.by}: ${w.name ?? "(none)"}`], ["changed", (w) => share(w.changed), true], ["n", (w) => count(w.n), true],
      ["expected cost a request", (w) => `${usd(w.cost_usd_before)} → ${usd(w.cost_usd_after)}`, true],
    ], made.who.slice(0, MOST_SHOWN), "nobody"),
    shown.length > 0 && h("h3", null, "Examples"),
    shown.map((e) => h("div", null,
      h("p", { class: "note" }, `${e.task ?? "no task"}, ${e.tenant ?? "no tenant"}: ${e.from} → ${e.to}, P(ok) ${p(e.p_ok[0])} → ${p(e.p_ok[1])}, request ${e.request_id}`),
      h("div", { class: "text", tabindex: "0", role: "region", "aria-label": `Beginning of request ${e.request_id}` }, e.text))),
    examples.length === 0 && h("p", { class: "note" }, "No example requests: the trade-off was made without --keep-prompts."),
  ];
}

function whole(t, scope, volume) {
  const rows = [
    ...t.settings.map((value, i) => [`least probability ${value}`, scope.settings[i]]),
    ...Object.entries(scope.singles).map(([model, level]) => [`always ${model}`, level]), ["always the cheapest", scope.cheapest],
  ];
  return h("details", null, h("summary", null, "The chart as a table"),
    table(`All policies; USD at ${count(volume)} requests a month`, [
      ["policy", ([name]) => name],
      ["quality", ([, l]) => quality(l.quality), true],
      ["cost a month", ([, l]) => (l.cost_usd ? `${usd(l.cost_usd[0] * volume)} (${usd(l.cost_usd[1] * volume)} to ${usd(l.cost_usd[2] * volume)})` : NOT_IDENTIFIABLE), true],
      ["latency, ms", ([, l]) => (l.latency_ms ? `${count(l.latency_ms[0])} (${count(l.latency_ms[1])} to ${count(l.latency_ms[2])})` : NOT_IDENTIFIABLE), true],
    ], rows));
}

export async function tradeoffView(me) {
  const [found, policy] = await Promise.all([get("/console/api/tradeoff"), policyInForce()]);
  const page = h("div", null, h("h2", null, "Trade-off"));
  const t = found.tradeoff;
  let inForce = policy.policy;
  const apply = applyPanel(me, policy, t, (now) => { inForce = now.policy; if (t) draw(); });
  if (!t) {
    page.append(h("p", { class: "warning" }, `${found.problem}. It is made with: `, h("code", null, "router-ml tradeoff --bundle BUNDLE --logs LOG --out tradeoff.json")),
      await apply.element());
    return page;
  }
  const wanted = t.tiers.find((each) => each.name === policy.policy.default_tier && each.today !== null)
    ?? t.tiers.find((each) => each.today !== null) ?? t.tiers[0];
  let [tier, scope] = [wanted, t.scopes[wanted.scope]];
  let volume = t.requests_a_month * (scope.by === "tier" ? scope.n / t.scopes[0].n : 1);
  const live = () => settingOf(t, inForce, tier.name);
  let at = live() >= 0 ? live() : tier.today ?? 0;
  let chart = null;

  const tiers = h("select", { id: "tier" }, t.tiers.map((each) => h("option", { value: each.name }, each.name)));
  tiers.value = tier.name;
  const scopes = h("select", { id: "scope" }, t.scopes.map((each, i) => h("option", { value: i },
    `${each.by === "all" ? "all requests" : `${each.by}: ${each.name}`} (${count(each.n)})`)));
  scopes.value = String(t.scopes.indexOf(scope));
  const monthly = h("input", { id: "volume", type: "number", min: 1, step: 1, value: Math.round(volume) });
  const slider = h("input", { id: "dial", type: "range", min: 0, max: t.settings.length - 1, step: 1, value: at, list: null });
  const figure = h("figure");
  const panel = h("div", { id: "numbers" });
  const below = h("div", { id: "below" });

  function draw() {
    const per = volume;
    const now = live();
    const marks = now >= 0 && now !== tier.today ? [[now, "in force"]] : [];
    if (tier.today !== null) marks.unshift([tier.today, marks.length ? "today when judged" : "today"]);
    chart = frontier(scope, marks, per, t.settings, (picked) => { slider.value = picked; show(picked); });
    const legend = ["line and band: the dial, with its interval at each setting", "disc: the chosen setting", "diamond: in force today",
      "circles: always one model", "square: always the cheapest"];
    figure.replaceChildren(...[
      chart ? chart.element : h("p", { class: "warning" }, `The frontier is ${NOT_IDENTIFIABLE} on these rows: ${scope.settings[at].why.quality ?? scope.settings[at].why.cost_usd ?? ""}`),
      h("figcaption", null, h("ul", { class: "legend" }, legend.map((each) => h("li", null, each))),
        h("p", { class: "note" }, scope.oracle
          ? `The oracle takes each request's best answer: quality ${scope.oracle.quality.toFixed(3)}, ${usd(scope.oracle.cost_usd * per)} a month.`
          : `Oracle: ${scope.oracle_why}.`)),
      whole(t, scope, per)]);
    show(at);
  }

  function show(next) {
    at = next;
    slider.setAttribute("aria-valuetext", settingText(scope.settings[at], t.settings[at], volume));
    if (chart) chart.move(at);
    const [made, now] = [tier.changes[at], live()];
    const held = made && against(t, tier, at, now);
    panel.replaceChildren(numbers(t, scope, tier, at, volume, now, held), shares(t, scope, tier, at));
    below.replaceChildren(...(made ? [h("h3", null, "What would change, and for whom"), ...slices(held),
      now !== tier.today && h("p", { class: "note" }, `Requests and examples below are held against ${t.settings[tier.today]}, the setting when it was judged.`),
      ...moved(made, t.examples)]
      .flat(Infinity).filter(Boolean) : [h("p", { class: "warning" }, `Tier ${tier.name} is not moved here: ${tier.why}.`)]));
    apply.chosen(made ? tier : null, made ? t.settings[at] : null);
  }

  tiers.addEventListener("change", () => {
    tier = t.tiers.find((each) => each.name === tiers.value);
    scope = t.scopes[tier.scope];
    scopes.value = String(tier.scope);
    at = live() >= 0 ? live() : tier.today ?? at;
    slider.value = at;
    slider.disabled = tier.today === null;
    rescale();
  });
  function rescale() {
    volume = t.requests_a_month * scope.n / t.scopes[0].n;
    monthly.value = Math.round(volume);
    draw();
  }
  scopes.addEventListener("change", () => { scope = t.scopes[Number(scopes.value)]; rescale(); });
  monthly.addEventListener("input", () => { if (Number(monthly.value) > 0) { volume = Number(monthly.value); draw(); } });
  slider.addEventListener("input", () => show(Number(slider.value)));
  narrow.addEventListener("change", function again() {
    if (figure.isConnected) draw();
    else narrow.removeEventListener("change", again);
  });

  page.append(...sourceLines(found).flat(Infinity),
    h("div", { class: "controls" }, field("Tier whose promise is set", tiers), field("Shown for", scopes), field("Requests a month", monthly)),
    h("p", { class: "note" }, `Requests a month as the log has them: ${count(t.source.requests)} in ${signed(t.source.days, 1).slice(1)} days, times ${t.days_a_month}; change the number to plan for another.`),
    h("p", { class: "note" }, "A setting is a tier's: it is applied to all requests of the tier, whatever their task, since a policy has no dial by task. " +
      "A tier or a task above is whose figures are shown."),
    h("div", { class: "slider" }, h("label", { for: "dial" }, "Least probability of an acceptable answer"), slider),
    h("div", { class: "columns" }, figure, panel), below, await apply.element());
  draw();
  return page;
}
