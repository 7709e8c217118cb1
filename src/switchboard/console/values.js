/**
 * JSON for people: objects as names and values, lists of objects as tables, and the raw text beside it.
 * @module
 */

import { fill, h } from "./dom.js";
import { heading, number } from "./format.js";
import { copyButton } from "./parts.js";

const DEEPEST = 4;

// A few kilobytes from a workflow can be a table of a million cells.
const MOST_ITEMS = 200;
const MOST_COLUMNS = 30;
const MOST_CELLS = 1000;

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

/** The raw text of a value. */
export const raw = (value) => JSON.stringify(value, null, 2);

/** A value as readable as it gets. */
export function readable(value, depth = 0) {
  if (value === null || value === undefined) return h("span", { class: "none" }, "none");
  if (typeof value === "boolean") return h("span", {}, value ? "yes" : "no");
  if (typeof value !== "object")
    return h("span", { class: typeof value === "number" ? "number" : "text" }, String(value));
  const size = Array.isArray(value) ? value.length : Object.keys(value).length;
  if (size === 0) return h("span", { class: "none" }, "empty");
  if (depth >= DEEPEST) return h("code", { class: "text" }, JSON.stringify(value));
  if (!Array.isArray(value)) return pairs(Object.entries(value), depth);
  if (value.every(isObject)) return table(value);
  const items = value.slice(0, MOST_ITEMS).map((item) => h("li", {}, readable(item, depth + 1)));
  return [h("ul", { class: "values" }, items), rest(size - items.length, "item")];
}

function pairs(entries, depth) {
  const row = ([name, value]) => [h("dt", { title: name }, heading(name)), h("dd", {}, readable(value, depth + 1))];
  const shown = entries.slice(0, MOST_ITEMS);
  return [h("dl", { class: "pairs" }, shown.map(row)), rest(entries.length - shown.length, "field")];
}

/** That there is more; the raw text has it all. */
const rest = (count, what) =>
  count > 0 && h("p", { class: "quiet" }, `… and ${number(count)} more ${what}${count === 1 ? "" : "s"}`);

/**
 * Objects as a table: the first of them, and the others when asked for.
 * @param {Record<string, any>[]} rows
 * @param {string[]} [columns] Their names, in order; all that occur unless given.
 * @param {string} [caption]
 */
export function table(rows, columns = [], caption = "") {
  const all = columns.length ? columns : [...new Set(rows.flatMap(Object.keys))];
  const names = all.slice(0, MOST_COLUMNS);
  const most = Math.floor(MOST_CELLS / names.length);
  const head = names.map((name) => h("th", { scope: "col", title: name }, heading(name)));
  const cell = (row, name) => h("td", {}, readable(Object.hasOwn(row, name) ? row[name] : null, DEEPEST));
  const line = (row) =>
    h(
      "tr",
      {},
      names.map((name) => cell(row, name)),
    );
  const body = h("tbody", {}, rows.slice(0, most).map(line));
  const scroll = h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption || "Table" },
    h(
      "table",
      { class: "rows" },
      caption && h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, head)),
      body,
    ),
  );
  const showAll = h(
    "button",
    { type: "button", class: "button small", on: { click: showOthers } },
    `Show all ${number(rows.length)} rows`,
  );

  function showOthers() {
    body.append(...rows.slice(most).map(line));
    scroll.focus(); // the button goes
    showAll.remove();
  }
  return [scroll, rows.length > most && showAll, rest(all.length - names.length, "column")];
}

/**
 * A value that can be looked at in both ways, and copied.
 * @param {any} of
 * @param {() => import("./dom.js").Child} [shown] How it is shown for people, if it is known better.
 */
export function value(of, shown = () => readable(of)) {
  const body = h("div", {});
  const text = raw(of);
  if (typeof of !== "object" || of === null) return h("div", { class: "value" }, readable(of));
  const show = (asText) => {
    toggle.setAttribute("aria-pressed", String(asText));
    fill(body, asText ? json(of) : shown());
  };
  const toggle = h(
    "button",
    {
      type: "button",
      class: "button small",
      on: { click: () => show(toggle.getAttribute("aria-pressed") !== "true") },
    },
    "Raw JSON",
  );
  show(false);
  return h(
    "div",
    { class: "value" },
    body,
    h("div", { class: "actions start" }, toggle, copyButton(text, "Copy as JSON", "Copy")),
  );
}

/** The raw text of a value, in a box that scrolls. */
export function json(of) {
  return h("pre", { class: "json", tabindex: 0, role: "region", "aria-label": "JSON" }, raw(of));
}
