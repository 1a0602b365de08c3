// The frontier: quality against cost a month, drawn as SVG; the chosen setting can be dragged or moved by keys.

import { svg, usd } from "./dom.js";

const H = 430, LEFT = 56, RIGHT = 16, TOP = 14, BOTTOM = 48;
export const narrow = matchMedia("(max-width: 34rem)");
let W = 640; // units of the drawing, which is as wide as there is room: on a narrow screen fewer, or no text could be read

function ticks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const digit of high / low > (W < 500 ? 30 : 300) ? [1] : [1, 2, 5]) {
      const value = digit * 10 ** power;
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found;
}

const both = (level) => level && level.quality && level.cost_usd;

function scales(levels, others, per) {
  const known = [...levels, ...others].filter(both);
  const costs = known.map((level) => Math.max(level.cost_usd[0] * per, 1e-9));
  const ends = known.flatMap((level) => level.quality);
  let [low, high] = [Math.min(...costs) / 1.25, Math.max(...costs) * 1.25];
  let [bottom, top] = [Math.min(...ends), Math.max(...ends)];
  const room = (top - bottom || 0.1) * 0.05;
  [bottom, top] = [bottom - room, top + room];
  const span = Math.log(high / low) || 1;
  return {
    low, high, bottom, top,
    x: (cost) => LEFT + (W - LEFT - RIGHT) * Math.log(Math.max(cost, low) / low) / span,
    y: (quality) => TOP + (H - TOP - BOTTOM) * (top - quality) / (top - bottom),
  };
}

function axes(s) {
  const made = [];
  for (const value of ticks(s.low, s.high)) {
    made.push(svg("line", { class: "grid", x1: s.x(value), x2: s.x(value), y1: TOP, y2: H - BOTTOM }),
      svg("text", { x: s.x(value), y: H - BOTTOM + 18, "text-anchor": "middle" }, value.toLocaleString("en-GB", { maximumSignificantDigits: 3 })));
  }
  for (let i = 0; i <= 4; i += 1) {
    const value = s.bottom + (s.top - s.bottom) * i / 4;
    made.push(svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: s.y(value), y2: s.y(value) }),
      svg("text", { x: LEFT - 6, y: s.y(value) + 4, "text-anchor": "end" }, value.toFixed(2)));
  }
  made.push(svg("text", { x: (LEFT + W - RIGHT) / 2, y: H - 8, "text-anchor": "middle" }, "USD a month, log scale"),
    svg("text", { x: 14, y: (TOP + H - BOTTOM) / 2, "text-anchor": "middle",
      transform: `rotate(-90 14 ${(TOP + H - BOTTOM) / 2})` }, "mean quality a request, 0 to 1"));
  return made;
}

function band(levels, s, per) {
  const sorted = levels.filter(both).sort((a, b) => a.cost_usd[0] - b.cost_usd[0]);
  if (!sorted.length) return [];
  const at = (level, i) => `${s.x(level.cost_usd[0] * per)},${s.y(level.quality[i])}`;
  return [
    svg("polygon", { class: "band", points: [...sorted.map((l) => at(l, 2)), ...sorted.reverse().map((l) => at(l, 1))].join(" ") }),
    svg("polyline", { class: "curve", points: levels.filter(both).map((l) => at(l, 0)).join(" ") }),
  ];
}

function mark(level, s, per, kind, name) {
  if (!both(level)) return [];
  const [x, y] = [s.x(level.cost_usd[0] * per), s.y(level.quality[0])];
  const shape = kind === "today" ? svg("path", { class: kind, d: `M${x} ${y - 8}l8 8l-8 8l-8 -8z` })
    : kind === "cheapest" ? svg("rect", { class: kind, x: x - 5, y: y - 5, width: 10, height: 10 })
      : svg("circle", { class: kind, cx: x, cy: y, r: 5 });
  const right = x > W * 0.72;
  const label = svg("text", { x: right ? x - 9 : x + 9, y: y + (kind === "single" ? 14 : -8), "text-anchor": right ? "end" : "start" }, name);
  const spread = svg("line", { class: `error ${kind}`, x1: x, x2: x, y1: s.y(level.quality[1]), y2: s.y(level.quality[2]) });
  return [spread, shape, label];
}

// A setting as a screen reader says it while it is moved.
export function settingText(level, setting, per) {
  return both(level) ? `least probability ${setting}: quality ${level.quality[0].toFixed(3)}, ${usd(level.cost_usd[0] * per)} a month`
    : `least probability ${setting}: not identifiable`;
}

// `scope` as in the file; `marks` are [position, name] of settings that are or were in force; `pick` is told of the position that is chosen by hand.
// The answer's `move(at)` shows another setting: two attributes change, nothing is drawn again.
export function frontier(scope, marks, per, settings, pick) {
  const width = narrow.matches ? 380 : 640;
  W = width;
  const oracle = scope.oracle && { quality: Array(3).fill(scope.oracle.quality), cost_usd: Array(3).fill(scope.oracle.cost_usd) };
  const singles = Object.entries(scope.singles);
  const others = [...singles.map(([, level]) => level), scope.cheapest, ...(oracle ? [oracle] : [])];
  if (![...scope.settings, ...others].some(both)) return null;
  const s = scales(scope.settings, others, per);
  const point = svg("circle", { class: "point", r: 9 });
  const handle = svg("circle", { class: "handle", r: 24, tabindex: 0, role: "slider", "aria-label": "Setting of the dial, on the chart",
    "aria-valuemin": settings[0], "aria-valuemax": settings.at(-1) });
  const made = svg("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": "Quality against cost a month; the table below holds the same" },
    axes(s), band(scope.settings, s, per),
    singles.map(([model, level]) => mark(level, s, per, "single", model)),
    mark(scope.cheapest, s, per, "cheapest", "always cheapest"),
    oracle ? mark(oracle, s, per, "oracle", "oracle") : [],
    marks.map(([at, name]) => mark(scope.settings[at], s, per, "today", name)), point, handle);
  let now = 0;

  const nearest = (event) => {
    const box = made.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * H / box.height];
    let [best, least] = [now, Infinity];
    scope.settings.forEach((level, i) => {
      if (!both(level)) return;
      const away = (s.x(level.cost_usd[0] * per) - x) ** 2 + (s.y(level.quality[0]) - y) ** 2;
      if (away < least - 1e-9) [best, least] = [i, away];
    });
    return best;
  };
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    event.preventDefault();
    handle.focus();
  });
  handle.addEventListener("pointermove", (event) => {
    if (!handle.hasPointerCapture(event.pointerId)) return;
    const at = nearest(event);
    if (at !== now) pick(at);
  });
  handle.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5, Home: -1e6, End: 1e6 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    pick(Math.max(0, Math.min(settings.length - 1, now + step)));
  });

  function move(at) {
    now = at;
    const level = scope.settings[at];
    for (const each of [point, handle]) {
      each.toggleAttribute("hidden", !both(level));
      if (both(level)) {
        each.setAttribute("cx", s.x(level.cost_usd[0] * per));
        each.setAttribute("cy", s.y(level.quality[0]));
      }
    }
    handle.setAttribute("aria-valuenow", settings[at]);
    handle.setAttribute("aria-valuetext", settingText(level, settings[at], per));
  }
  return { element: made, move };
}
