/**
 * The small things of which every view is made.
 * @module
 */

import { fill, h, say, svg } from "./dom.js";
import { ago, duration, exact, middle, STATUSES } from "./format.js";
import { every } from "./pacing.js";

const PATHS = {
  done: "M8 1.5a6.5 6.5 0 1 0 0 13a6.5 6.5 0 1 0 0-13zM5 8.2l2.1 2.1L11 6.1",
  failed: "M5.3 1.8h5.4l3.5 3.5v5.4l-3.5 3.5H5.3l-3.5-3.5V5.3zM6 6l4 4M10 6l-4 4",
  stopped: "M8 1.5a6.5 6.5 0 1 0 0 13a6.5 6.5 0 1 0 0-13zM3.5 12.5l9-9",
  running: "M8 1.5a6.5 6.5 0 1 0 6.5 6.5",
  waiting: "M8 1.5a6.5 6.5 0 1 0 0 13a6.5 6.5 0 1 0 0-13zM8 4.5V8l2.3 1.5",
  runs: "M2 4h12M2 8h12M2 12h8",
  approvals: "M3 8.5l3.2 3L13 4.5",
  deliveries: "M2 3.5h12v9H2zM2 4.5l6 4.5l6-4.5",
  plus: "M8 3v10M3 8h10",
  copy: "M5.5 5.5h8v8h-8zM10.5 5.5v-3h-8v8h3",
  out: "M6 3H3v10h10v-3M9 3h4v4M13 3L7.5 8.5",
  back: "M10 3L5 8l5 5",
  theme: "M8 1.5a6.5 6.5 0 1 0 0 13zM8 1.5a6.5 6.5 0 0 1 0 13z",
  leave: "M6.5 2.5h-4v11h4M10 5l3 3l-3 3M13 8H6",
  book: "M8 4C6.5 2.8 4.5 2.5 2 2.5v10c2.5 0 4.5.3 6 1.5c1.5-1.2 3.5-1.5 6-1.5v-10c-2.5 0-4.5.3-6 1.5zV14",
  again: "M13.5 8a5.5 5.5 0 1 1-1.7-4M13.5 1.5v3h-3",
  remove: "M4 4l8 8M12 4l-8 8",
  phone: "M4 2h2l1.2 3.2l-1.6 1.2c.8 1.8 2.2 3.2 4 4l1.2-1.6L14 10v2c0 1.1-.9 2-2 2C6.5 14 2 9.5 2 4c0-1.1.9-2 2-2z",
  empty: "M2 9.5h3.5l1 2h3l1-2H14M2 9.5L4 3h8l2 6.5v4H2z",
};

/** A drawing beside a word, which says the same. */
export function icon(name) {
  const attributes = { class: `icon icon-${name}`, viewBox: "0 0 16 16", "aria-hidden": "true", focusable: "false" };
  return svg("svg", attributes, svg("path", { d: PATHS[name] }));
}

/** A run's status; `update` shows another. */
export function badge(status, words = STATUSES) {
  const element = h("span", { class: "badge" });
  const update = (now) => {
    if (element.dataset.status === now) return;
    element.dataset.status = now;
    const { word, icon: shape } = words[now] ?? { word: now, icon: "waiting" };
    fill(element, icon(shape), h("span", {}, word));
  };
  update(status);
  return { element, update };
}

/** A moment as "5 min ago", which goes on; the exact one when pointed at. */
export function when(moment) {
  return h("time", { datetime: moment, title: exact(moment), data: { ticks: "" } }, ago(moment));
}

/** Seconds from a moment until another, or until now and counting. */
export function lasting(from, to) {
  const element = h("span", { class: "number" });
  const update = (since, until) => {
    if (until) delete element.dataset.since;
    else element.dataset.since = since;
    say(element, duration((new Date(until ?? Date.now()) - new Date(since)) / 1000));
  };
  update(from, to);
  return { element, update };
}

/** Makes the times on the page go on. */
export function startClock(signal) {
  every(
    1000,
    () => {
      for (const time of document.querySelectorAll("time[data-ticks]")) say(time, ago(time.dateTime));
      for (const span of document.querySelectorAll("[data-since]")) {
        say(span, duration(Math.floor((Date.now() - new Date(span.dataset.since)) / 1000)));
      }
    },
    signal,
  );
}

/** An id, shortened in the middle, to be copied whole; a link if it leads anywhere. */
export function id(text, most = 18, href = null) {
  const code = h("code", { title: text }, middle(text, most));
  return h("span", { class: "id" }, href ? h("a", { href }, code) : code, copyButton(text, "Copy the id"));
}

/** A button that copies what it is given. */
export function copyButton(text, label, visibleLabel = null) {
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      notice("Copied");
    } catch {
      notice("The browser did not allow it to be copied", { bad: true });
    }
  };
  const look = visibleLabel ? "button small" : "button bare tiny";
  const attributes = { type: "button", class: look, "aria-label": visibleLabel ? null : label, title: label };
  return h("button", { ...attributes, on: { click: copy } }, icon("copy"), visibleLabel);
}

/** Tells everybody what came of something: shows it for a while, and has it read aloud. */
export function notice(text, { bad = false } = {}) {
  const element = h("p", { class: bad ? "notice bad" : "notice" }, text);
  const place = document.getElementById("notices");
  place.append(element);
  if (place.childElementCount > 3) place.firstElementChild.remove();
  setTimeout(() => element.remove(), bad ? 8000 : 4000);
  announce(text);
}

/** Has something read aloud. */
export function announce(text) {
  fill(document.getElementById("announcements"), text);
}

/** What stands in place of something that is being fetched: as high as that will be. */
export function skeleton(lines = 3) {
  const bars = Array.from({ length: lines }, () => h("span", { class: "bone" }));
  return h("div", { class: "skeleton", role: "status" }, h("span", { class: "unseen" }, "Loading"), bars);
}

/** Why something cannot be shown, and a way to try again. */
export function failure(error, again) {
  const retry =
    again && h("button", { type: "button", class: "button small", on: { click: again } }, icon("again"), "Try again");
  return h("div", { class: "failure" }, h("p", {}, icon("failed"), error.message ?? String(error)), retry);
}

/** That there is nothing, and why. */
export function nothing(title, ...text) {
  return h("div", { class: "nothing" }, icon("empty"), h("p", { class: "nothing-title" }, title), h("p", {}, text));
}

/** A group of buttons, one of which is pressed. */
export function choice(label, options, chosen, choose) {
  const buttons = options.map(([value, word]) =>
    h("button", { type: "button", data: { value }, on: { click: () => choose(value) } }, word),
  );
  const element = h("div", { class: "choice", role: "group", "aria-label": label }, buttons);
  const update = (now) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === now));
  };
  update(chosen);
  return { element, update };
}

/**
 * Asks before something is done that cannot be undone; no longer when the signal says so.
 * @returns {Promise<boolean>}
 */
export function confirmed({ title, text, action, keep, signal }) {
  return new Promise((answer) => {
    const dialog = h(
      "dialog",
      { "aria-labelledby": "question", class: "dialog" },
      h("h2", { id: "question" }, title),
      h("p", {}, text),
      h(
        "div",
        { class: "actions" },
        h("button", { type: "button", class: "button", autofocus: true, on: { click: () => dialog.close() } }, keep),
        h("button", { type: "button", class: "button danger", on: { click: () => dialog.close("yes") } }, action),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      answer(dialog.returnValue === "yes");
    });
    signal.addEventListener("abort", () => dialog.close());
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Does something with a button switched off meanwhile; its errors become a notice, unless somebody has left. */
export async function withButton(button, work) {
  const held = document.activeElement === button;
  button.disabled = true;
  button.setAttribute("aria-busy", "true");
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message, { bad: true });
  } finally {
    button.disabled = false;
    button.removeAttribute("aria-busy");
    // A button that is switched off loses the focus.
    if (held && document.activeElement === document.body) button.focus({ preventScroll: true });
  }
}
