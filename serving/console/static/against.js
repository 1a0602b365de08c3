// A setting of the dial held against the one that is in force now, and what of it is weaker than the promotion gate allows.
//
// The file has each setting's change against the setting of the day on which it was made, with its interval, and how sure
// the difference of any two settings is (`apart`). Changes are sums over the same requests, so the change against a
// third setting is the difference of two changes; its interval is as far out, in standard errors, as the wider of theirs.

import { NOT_IDENTIFIABLE, signed } from "./dom.js";

function apart(errors, i, j, k) {
  if (i === j) return 0;
  const [a, b] = i < j ? [i, j] : [j, i];
  return errors[a * k - a * (a + 1) / 2 + (b - a - 1)];
}

function between(made, base, errors, at, live, today, k) {
  const error = errors && apart(errors, at, live, k);
  if (!made || !base || error === undefined || error === null) return null;
  let [below, above] = [0, 0]; // standard errors
  const wide = (change, position, [down, up]) => {
    const own = apart(errors, position, today, k);
    if (own > 0) [below, above] = [Math.max(below, down(change) / own), Math.max(above, up(change) / own)];
  };
  const [low, high] = [(c) => c[0] - c[1], (c) => c[2] - c[0]];
  wide(made, at, [low, high]);
  wide(base, live, [high, low]);
  const value = made[0] - base[0];
  return [value, value - below * error, value + above * error];
}

// `gate` are the limits in the file. The sentences are those of training/tradeoff_changes.py.
function weaker(quality, slices, gate) {
  const said = [];
  const words = (c) => `${signed(c[0])} (${signed(c[1])} to ${signed(c[2])})`;
  if (!quality) said.push(`quality: ${NOT_IDENTIFIABLE}`);
  else if (quality[1] < -gate.quality) said.push(`quality changes by ${words(quality)}; its lower bound has to be -${gate.quality} or more`);
  for (const s of slices) {
    const large = s.n >= gate.slice_rows;
    if (!s.quality && large) said.push(`${s.by} ${s.name}: ${NOT_IDENTIFIABLE}`);
    if (s.quality && s.quality[large ? 1 : 2] < -gate.slice) {
      said.push(`${s.by} ${s.name}: ${words(s.quality)}; the ${large ? "lower" : "upper"} bound has to be -${gate.slice} or more`);
    }
  }
  return said;
}

// The change of the setting at position `at` of a tier against the one in force (at `live`, -1: it was not judged), as in
// the file, and `weaker`. Where it cannot be known, `weaker` says that: whoever applies it is asked.
export function against(t, tier, at, live) {
  const made = tier.changes[at];
  if (live === tier.today) return made;
  const unknown = (why) => ({ quality: null, cost_usd: null, slices: [], weaker: [`whether it is weaker than what is in force is not known: ${why}; run router-ml tradeoff again`] });
  if (live < 0) return unknown("that setting is not among those that were judged");
  if (!tier.apart?.quality || !t.gate) return unknown(tier.apart ? "the log does not have quality" : "the trade-off is of an earlier version of the program");
  if (at === live) return { quality: [0, 0, 0], cost_usd: [0, 0, 0], slices: [], weaker: [] };
  const [base, k, of] = [tier.changes[live], t.settings.length, (c, s) => c.slices.find((one) => one.by === s.by && one.name === s.name)?.quality];
  const zero = [0, 0, 0]; // a setting that decides as today's did has no slices
  const slices = (made.slices.length ? made : base).slices.map((s) => ({ by: s.by, name: s.name, n: s.n,
    quality: between(made.slices.length ? of(made, s) : zero, base.slices.length ? of(base, s) : zero, tier.apart.slices[s.by]?.[s.name], at, live, tier.today, k) }));
  const quality = between(made.quality, base.quality, tier.apart.quality, at, live, tier.today, k);
  return { quality, cost_usd: between(made.cost_usd, base.cost_usd, tier.apart.cost_usd, at, live, tier.today, k), slices, weaker: weaker(quality, slices, t.gate) };
}

// The position of a tier's setting under a policy, -1 where it is none that was judged.
export function settingOf(t, policy, name) {
  const dial = policy.tiers[name];
  return t.settings.indexOf(dial?.min_probability ?? dial);
}

export function flat(value, path = "") {
  if (value === null || typeof value !== "object") return { [path]: JSON.stringify(value) };
  const entries = Object.entries(value);
  if (!entries.length) return { [path]: Array.isArray(value) ? "[]" : "{}" };
  return Object.assign({}, ...entries.map(([name, each]) => flat(each, path ? `${path}.${name}` : name)));
}

export function diff(before, after) {
  const [old, fresh] = [flat(before ?? {}), flat(after ?? {})];
  const names = [...new Set([...Object.keys(old), ...Object.keys(fresh)])].sort();
  return names.filter((name) => old[name] !== fresh[name]).map((name) => ({ name, old: old[name] ?? "—", fresh: fresh[name] ?? "—" }));
}

const parts = (dial) => (dial === null || typeof dial !== "object" ? { min_probability: dial } : dial);
const open = (changes) => changes.map((d) => `whether this is weaker is not known: ${d.name} ${d.old} → ${d.fresh}`);

// What of `after` is weaker than `before`, or may be: tier by tier as far as the file can tell (`t`, null: there is none), and
// every other setting by its name, since no file judges those. `served` is the bundle that has to keep the promise.
export function weakerPolicy(t, before, after, served) {
  const [said, unknown] = [[], []];
  let judged = false;
  for (const name of new Set([...Object.keys(before.tiers), ...Object.keys(after.tiers)])) {
    const [{ min_probability: old, ...was }, { min_probability: fresh, ...is }] = [parts(before.tiers[name]), parts(after.tiers[name])];
    unknown.push(...open(diff({ tiers: { [name]: was } }, { tiers: { [name]: is } }).filter((d) => d.name !== `tiers.${name}`)));
    if (old === fresh) continue;
    const tier = t?.tiers.find((each) => each.name === name);
    if (!tier || tier.today === null) { // no file tells: only a higher promise is surely none that is weaker
      const why = !tier || fresh > old ? "" : ` (tier ${name} was not judged: ${tier.why})`;
      if (!(fresh > old)) unknown.push(...open([{ name: `tiers.${name}`, old: old ?? "—", fresh: `${fresh ?? "—"}${why}` }]));
      continue;
    }
    judged = true;
    const [from, to] = [settingOf(t, before, name), settingOf(t, after, name)];
    if (to < 0) said.push(`tier ${name}: the setting ${fresh ?? "—"} is none that was judged`);
    else said.push(...against(t, tier, to, from).weaker.map((line) => (t.tiers.length > 1 ? `tier ${name}: ${line}` : line)));
  }
  if (judged && t.model_version !== served) {
    said.unshift(`the trade-off is of bundle ${t.model_version}, and ${served} serves: what that one keeps is not known; run router-ml tradeoff again`);
  }
  return [...said, ...unknown, ...open(diff({ ...before, tiers: null }, { ...after, tiers: null }))];
}
