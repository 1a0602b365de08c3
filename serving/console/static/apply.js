// Apply: a new policy version with a reason, after its diff and, where a promise gets weaker, a question; and the way back.

import { diff, weakerPolicy } from "./against.js";
import { ask, complain, count, h, say, table, when } from "./dom.js";
import { get, policyInForce, putPolicy } from "./http.js";

function diffTable(caption, before, after) {
  return table(caption, [["setting", (d) => h("code", null, d.name)], ["before", (d) => d.old, true], ["after", (d) => d.fresh, true]],
    diff(before, after), "no difference");
}

const LATEST = 10; // versions that are shown before all are asked for

// The question before a promise that is weaker, or may be.
function question(weaker) {
  return [h("p", null, "Against what is in force, a promise would be weaker than the promotion gate allows, or whether it would be is not known:"),
    h("ul", null, weaker.map((each) => h("li", null, each)))];
}

function withDial(policy, tier, value) {
  const old = policy.tiers[tier];
  const fresh = typeof old === "object" ? { ...old, min_probability: value } : value;
  return { ...policy, tiers: { ...policy.tiers, [tier]: fresh } };
}

// `policy` is what is in force with its etag, and `changed` is told of what follows it. `chosen(tier, value)` says what would be applied (null: nothing).
export function applyPanel(me, policy, tradeoff, changed = () => {}) {
  let now = policy;
  let picked = { tier: null, value: null };
  const preview = h("div", { id: "diff" });
  const asked = h("div", { id: "gate", class: "warning", hidden: true });
  const sure = h("input", { id: "sure", type: "checkbox" });
  const reason = h("textarea", { id: "reason", required: true, maxlength: 500, "aria-describedby": "reason-note" });
  const button = h("button", { class: "primary", id: "apply" }, "Apply");
  const history = h("div", { id: "history" });
  const heading = h("h3", { tabindex: "-1" }, "Versions of the policy");
  let all = false; // of the versions, more than the latest ten
  const why = me.may_apply ? null : me.policy_file
    ? `The file ${me.policy_file} sets the policy: change it there.` : "This key may read and not change: applying needs one of the scope admin.";

  function next() {
    return picked.tier && picked.tier in now.policy.tiers ? withDial(now.policy, picked.tier, picked.value) : null;
  }

  function show() {
    const after = next();
    const differs = after !== null && diff(now.policy, after).length > 0;
    preview.replaceChildren(after ? diffTable(`Policy ${now.version}, in force, and what would follow it`, now.policy, after)
      : h("p", { class: "note" }, picked.tier ? `The policy in force has no tier ${picked.tier}.` : "Nothing is chosen."));
    const weaker = differs ? weakerPolicy(tradeoff, now.policy, after, me.model_version) : [];
    asked.hidden = !weaker.length;
    if (weaker.length) {
      asked.replaceChildren(...question(weaker),
        h("p", null, sure, " ", h("label", { for: "sure" }, "Apply it all the same; the reason below says why")));
    } else {
      sure.checked = false;
    }
    button.disabled = !me.may_apply || !differs;
  }

  // After a 412: the policy of somebody else, which the process that answers may come to know a moment later.
  async function theirs() {
    for (let turn = 0; turn < 6; turn += 1) {
      const found = await policyInForce();
      if (found.etag !== now.etag) return found;
      await new Promise((wait) => { setTimeout(wait, 500); });
    }
    throw new Error("the process that answers does not know it yet");
  }

  async function refused(problem) {
    if (problem.status === 0) {
      complain("Whether it is saved is not known: the service does not answer. Load this page again to see which version is in force.");
    } else if (problem.status !== 412) {
      complain(`Not saved: ${problem.message}.`);
    } else {
      try {
        now = await theirs();
        complain(`Not saved: somebody has changed the policy meanwhile, version ${now.version} is in force now. The difference below is ` +
          "against that one: look again, then apply.");
      } catch (other) {
        complain(`Not saved: somebody has changed the policy meanwhile, and which one is in force cannot be read (${other.message}). ` +
          "Load this page again, then apply.");
      }
    }
  }

  async function put(body, text, done) {
    button.disabled = true;
    try {
      now = await putPolicy(body, now.etag, text);
      reason.value = "";
      sure.checked = false;
      say(`${done}: policy ${now.version} is in force since ${when(Date.now() * 1000)}, in every process within 2 seconds.`);
    } catch (problem) {
      await refused(problem);
    }
    document.getElementById("served").dispatchEvent(new Event("refresh"));
    changed(now);
    show();
    await past().catch((problem) => history.replaceChildren(heading,
      h("p", { class: "warning" }, `The versions cannot be shown now: ${problem.message}. Load this page again to see them.`)));
  }

  async function undo(each) {
    const weaker = weakerPolicy(tradeoff, now.policy, each.before.policy, me.model_version);
    const sure = !weaker.length || await ask(`Undo ${each.after.version}?`, question(weaker), "Undo all the same");
    if (!sure) return;
    await put(each.before.policy, `undo of ${each.after.version}`, "Undone");
    if (document.activeElement === document.body) heading.focus(); // the button that was pressed is gone
  }

  async function past() {
    const { changes } = await get("/console/api/changes");
    const policies = changes.filter((each) => each.kind === "policy").reverse();
    const lines = policies.slice(0, all ? undefined : LATEST).map((each, i) => {
      const back = i === 0 && each.before && each.after.version === now.version && me.may_apply;
      return { ...each, undo: back && h("button", { class: "undo", type: "button",
        onclick: () => undo(each) }, `Undo, back to ${each.before.version}`) };
    });
    const more = !all && policies.length > LATEST && h("button", { type: "button", id: "all-versions", onclick: () => {
      all = true;
      past().then(() => heading.focus(), (problem) => complain(`${problem.message}.`));
    } }, `Show all ${count(policies.length)}`);
    history.replaceChildren(...[heading,
      table("From the audit log, the newest first", [
        ["version", (c) => h("code", null, c.after.version)], ["since", (c) => when(c.time_us)], ["who", (c) => c.who],
        ["why", (c) => c.reason ?? "no reason given"],
        ["what", (c) => (c.before ? diff(c.before.policy, c.after.policy).map((d) => h("div", null, `${d.name}: ${d.old} → ${d.fresh}`)) : "the first that was noted")],
        ["", (c) => c.undo || ""],
      ], lines), more].filter(Boolean));
  }

  const form = h("form", { novalidate: true, onsubmit: (event) => {
    event.preventDefault();
    const body = next();
    if (!body) return;
    if (!reason.value.trim()) {
      complain("Say why: the reason is kept with the version.");
      reason.focus();
    } else if (!asked.hidden && !sure.checked) {
      complain("A promise would be weaker than the gate allows, or may be: confirm it above the reason, or choose another setting.");
      sure.focus();
    } else {
      put(body, reason.value.trim(), "Applied");
    }
  } }, preview, asked, me.may_apply && h("div", null, h("label", { for: "reason" }, "Why"), reason,
    h("p", { class: "note", id: "reason-note" }, "Kept with the version in the audit log, at most 500 characters.")), h("p", null, button));

  return {
    chosen(tier, value) {
      picked = { tier: tier?.name ?? null, value };
      show();
    },
    async element() {
      show();
      await past();
      return h("section", { class: "apply", "aria-label": "Apply" }, h("h3", null, "Apply"), why && h("p", { class: "note", id: "why-not" }, why),
        tradeoff ? form : null, history);
    },
  };
}
