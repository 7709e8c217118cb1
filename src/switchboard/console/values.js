/**
 * JSON for people: objects as names and values, lists of objects as tables, and the raw text beside it.
 * @module
 */

import { fill, h } from "./dom.js";
import { heading } from "./format.js";
import { copyButton } from "./parts.js";

const DEEPEST = 4;
const MOST_ROWS = 200;

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
  return h(
    "ul",
    { class: "values" },
    value.slice(0, MOST_ROWS).map((item) => h("li", {}, readable(item, depth + 1))),
  );
}

function pairs(entries, depth) {
  const row = ([name, value]) => [h("dt", { title: name }, heading(name)), h("dd", {}, readable(value, depth + 1))];
  return h("dl", { class: "pairs" }, entries.map(row));
}

/**
 * Objects as a table.
 * @param {Record<string, any>[]} rows
 * @param {string[]} [columns] Their names, in order; all that occur unless given.
 * @param {string} [caption]
 */
export function table(rows, columns = [], caption = "") {
  const shown = rows.slice(0, MOST_ROWS);
  const names = columns.length ? columns : [...new Set(shown.flatMap(Object.keys))];
  const more = rows.length - shown.length;
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption || "Table" },
    h(
      "table",
      { class: "rows" },
      caption && h("caption", { class: "unseen" }, caption),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          names.map((name) => h("th", { scope: "col", title: name }, heading(name))),
        ),
      ),
      h(
        "tbody",
        {},
        shown.map((row) =>
          h(
            "tr",
            {},
            names.map((name) => h("td", {}, readable(Object.hasOwn(row, name) ? row[name] : null, DEEPEST))),
          ),
        ),
      ),
    ),
    more > 0 && h("p", { class: "quiet" }, `… and ${more} more`),
  );
}

/** A value that can be looked at in both ways, and copied. */
export function value(of) {
  const body = h("div", {});
  const text = raw(of);
  if (typeof of !== "object" || of === null) return h("div", { class: "value" }, readable(of));
  const show = (asText) => {
    toggle.setAttribute("aria-pressed", String(asText));
    fill(body, asText ? json(of) : readable(of));
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
