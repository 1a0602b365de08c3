// The views, each made anew when it is opened; and the key.

import { decisionsView } from "./decisions.js";
import { complain, h, when } from "./dom.js";
import { forgetKey, get, useKey } from "./http.js";
import { modelsView } from "./models.js";
import { releasesView } from "./releases.js";
import { savingsView } from "./savings.js";
import { tradeoffView } from "./tradeoff.js";

const VIEWS = {
  tradeoff: ["Trade-off", tradeoffView], models: ["Models", modelsView], decisions: ["Decisions", decisionsView],
  savings: ["Savings", savingsView], releases: ["Releases", releasesView],
};
const main = document.getElementById("main");
const login = document.getElementById("login");
const served = document.getElementById("served");
let turn = 0;

const asked = () => location.hash.replace("#/", "").split("/");

function links(now) {
  document.getElementById("views").replaceChildren(...Object.entries(VIEWS).map(([name, [title]]) =>
    h("li", null, h("a", { href: `#/${name}`, "aria-current": name === now ? "page" : null }, title))));
}

async function whoAmI() {
  const me = await get("/console/api/me");
  served.replaceChildren(`bundle ${me.model_version}, policy ${me.policy_version}, ${me.key ? `key ${me.key}` : "no keys are asked for"}` +
    `${me.may_apply ? "" : ", read-only"}${me.degraded.length ? `, degraded: ${me.degraded.join(", ")}` : ""}; as of ${when(me.time_us)}`);
  return me;
}

async function open() {
  const mine = (turn += 1);
  const [wanted, ...rest] = asked();
  const name = wanted in VIEWS ? wanted : "tradeoff";
  links(name);
  main.setAttribute("aria-busy", "true");
  try {
    const me = await whoAmI();
    const page = await VIEWS[name][1](me, rest.map(decodeURIComponent));
    if (mine !== turn) return;
    login.hidden = true;
    main.replaceChildren(page);
    document.title = `${VIEWS[name][0]} – router-ml console`;
  } catch (problem) {
    if (mine !== turn) return;
    const why = problem.status === undefined ? `This view cannot be drawn (${problem.name}): what it is drawn from may be damaged, or of another version of the program`
      : problem.message;
    main.replaceChildren(h("h2", null, VIEWS[name][0]), h("p", { class: "warning" }, `${why}.`)); // nothing of the view before under this one's name
    document.title = `${VIEWS[name][0]} – router-ml console`;
    if (problem.status === undefined) throw problem;
    if (problem.status === 401 || problem.status === 403) {
      forgetKey();
      main.replaceChildren();
      served.replaceChildren();
      login.hidden = false;
      document.getElementById("key").focus();
    }
    if (!login.hidden) complain(problem.status === 401 ? "The service asks for an API key." : `${problem.message}.`);
  } finally {
    if (mine === turn) main.removeAttribute("aria-busy");
  }
}

// What had the focus is gone with the view before; where a key is asked for, its field has it.
function toMain() {
  if (login.hidden) main.focus();
}

login.addEventListener("submit", (event) => {
  event.preventDefault();
  const key = document.getElementById("key");
  useKey(key.value.trim());
  key.value = "";
  document.getElementById("alert").replaceChildren();
  open().then(toMain);
});
served.addEventListener("refresh", () => { whoAmI().catch(() => {}); });
window.addEventListener("hashchange", () => {
  document.getElementById("alert").replaceChildren();
  document.getElementById("status").replaceChildren();
  open().then(toMain);
});
open();
