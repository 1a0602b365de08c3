// Elements are made and filled here alone, and text goes in as text: nothing that a log or a prompt holds becomes markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return element;
}

export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const LANGUAGE = "en-GB";
export const NOT_IDENTIFIABLE = "not identifiable";

export function count(n) {
  return n === null || n === undefined ? "not known" : Math.round(n).toLocaleString(LANGUAGE);
}

export function usd(value) {
  if (value === null || value === undefined) return "not known";
  const size = Math.abs(value);
  const digits = size >= 1000 ? { maximumFractionDigits: 0 } : size >= 1
    ? { minimumFractionDigits: 2, maximumFractionDigits: 2 } : { maximumSignificantDigits: 3 };
  return `${value.toLocaleString(LANGUAGE, digits)} USD`;
}

export const nano = (value) => usd(Number(value) / 1e9);
export const share = (value) => `${(100 * value).toLocaleString(LANGUAGE, { maximumFractionDigits: 1 })} %`;

export function signed(value, digits = 3) {
  return (value > 0 ? "+" : "") + value.toLocaleString(LANGUAGE, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function quality(found) {
  return found ? `${found[0].toFixed(3)} (${found[1].toFixed(3)} to ${found[2].toFixed(3)})` : NOT_IDENTIFIABLE;
}

export function change(found) {
  return found ? `${signed(found[0])} (${signed(found[1])} to ${signed(found[2])})` : NOT_IDENTIFIABLE;
}

export function when(time) {
  const date = typeof time === "number" ? new Date(time / 1000) : new Date(time ?? NaN);
  if (Number.isNaN(date.getTime())) return "at a time that is not known";
  return `${date.toISOString().slice(0, 16).replace("T", " ")} UTC`;
}

// `columns` are [heading, function of a row, is it a number]; a cell may be a node.
export function table(caption, columns, rows, none = "none") {
  const heads = columns.map(([name, , number]) => h("th", { scope: "col", class: number ? "number" : null }, name));
  const lines = rows.map((row) => h("tr", null, columns.map(([, of, number], i) => {
    const what = of(row);
    return i === 0 ? h("th", { scope: "row" }, what) : h("td", { class: number ? "number" : null }, what);
  })));
  if (!rows.length) lines.push(h("tr", null, h("td", { colspan: columns.length }, none)));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", null, h("caption", null, caption), h("thead", null, h("tr", null, heads)), h("tbody", null, lines)));
}

export function field(label, control) {
  return h("div", null, h("label", { for: control.id }, label), control);
}

// A text that has to say why: `problem()` is what is wrong with it.
export function reasonField(note) {
  const area = h("textarea", { id: "why", required: true, maxlength: 500, "aria-describedby": "why-note", autofocus: true });
  return {
    element: h("div", null, h("label", { for: "why" }, "Why"), area, h("p", { class: "note", id: "why-note" }, note)),
    value: () => area.value.trim(),
    problem: () => (area.value.trim() ? null : [area, "Say why: the reason is kept."]),
  };
}

// Asks before something is done: true where it is to be. `problem()` gives [where, what] where it cannot be yet.
export function ask(title, children, confirm, problem = () => null) {
  return new Promise((answer) => {
    let sure = false;
    const said = h("p", { class: "worse", role: "alert" });
    const form = h("form", { novalidate: true, onsubmit: (event) => {
      event.preventDefault();
      const wrong = problem();
      sure = wrong === null;
      if (sure) {
        dialog.close();
      } else {
        said.replaceChildren(wrong[1]);
        wrong[0].focus();
      }
    } }, h("h3", { id: "ask" }, title), children, said,
    h("p", { class: "buttons" }, h("button", { class: "primary" }, confirm), h("button", { type: "button", onclick: () => dialog.close() }, "Cancel")));
    const dialog = h("dialog", { "aria-labelledby": "ask", onclose: () => { dialog.remove(); answer(sure); } }, form);
    document.body.append(dialog);
    dialog.showModal(); // the browser keeps the focus in it, and gives it back to where it was
  });
}

export function say(text) {
  document.getElementById("alert").replaceChildren();
  document.getElementById("status").replaceChildren(text);
}

export function complain(text) {
  document.getElementById("status").replaceChildren();
  document.getElementById("alert").replaceChildren(text);
}
