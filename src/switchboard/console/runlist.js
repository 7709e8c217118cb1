/**
 * The list of runs: read page by page, and kept as things happen.
 * @module
 */

import { page as pageOf } from "./api.js";
import { fill, h, keyed, say } from "./dom.js";
import { gist, isOver, middle, number } from "./format.js";
import { badge, failure, lasting, nothing, skeleton, when, withButton } from "./parts.js";
import { every, paced, perFrame } from "./pacing.js";
import { address } from "./router.js";

const PAGE = 50;
const MOST = 1000; // as many as the API gives at once

/**
 * @typedef {object} Filter
 * @property {string} [context_id]
 * @property {string} [workflow_id]
 * @property {string} [status]
 */

/**
 * @param {import("./main.js").Page} page
 * @returns {{ element: Element, show(filter: Filter): void }}
 */
export function runList(page) {
  /** @type {Map<string, any>} By run id, newest first. */
  let runs = new Map();
  /** Runs for which the list was read, with which status: if it does not show them, they are further down. */
  let elsewhere = new Map();
  let filter = {};
  let next = null;
  let wanted = PAGE;
  let asked = new AbortController();
  /** What has happened since the list was asked for, and may not be in the answer: of each answer that is to come. */
  const meanwhiles = new Set();

  const body = h("tbody", { role: "rowgroup" });
  const trouble = h("div", {});
  const shown = h("span", { class: "quiet" });
  const load = h(
    "button",
    { type: "button", class: "button", hidden: true, on: { click: () => withButton(load, loadOlder) } },
    "Load older",
  );
  const state = h("div", {});
  const list = h("table", { class: "list", role: "table", "aria-label": "Runs", hidden: true }, head(), body);
  const element = h("div", { class: "runs" }, list, state, h("div", { class: "more" }, trouble, shown, load));

  const draw = perFrame(() => {
    keyed(
      body,
      [...runs.values()],
      (run) => run.runId,
      (run) => row(run, page),
    );
    list.hidden = runs.size === 0;
  });
  const refresh = paced(page.signal, 1000, () => read(null));

  /** Reads the list anew, or what comes after it. Kept whole: the cursor is that of the answer. */
  async function read(from) {
    const meanwhile = [];
    meanwhiles.add(meanwhile);
    try {
      const { signal } = asked;
      const limit = wanted;
      const found = await pageOf(from ?? "/runs", from ? {} : { ...filter, limit }, signal);
      if (!from && limit !== wanted) return refresh(); // more has been asked for since
      if (!from) runs = new Map();
      for (const run of found.items) runs.set(run.runId, { ...run, latest: latest(run) });
      next = found.next;
      meanwhile.forEach(apply);
      fill(state, runs.size === 0 && empty(filter));
      fill(trouble);
      draw();
      offerOlder();
    } catch (error) {
      if (error.name === "AbortError") return;
      // What is there stays: it is only not the newest.
      if (runs.size === 0) fill(state, failure(error, start));
      else
        fill(
          trouble,
          failure(error, () => refresh(true)),
        );
    } finally {
      meanwhiles.delete(meanwhile);
    }
  }

  function offerOlder() {
    const full = next !== null && runs.size >= MOST;
    const count = `${number(runs.size)} shown, newest first`;
    say(shown, runs.size === 0 ? "" : full ? `${count}. Narrow the list down to see older ones.` : count);
    load.hidden = next === null || full;
  }

  function loadOlder() {
    wanted = Math.min(MOST, runs.size + PAGE);
    return read(next);
  }

  /** Returns whether the event is about a run that may have to be in the list, and is not. */
  function apply(event) {
    const run = runs.get(event.run_id);
    if (!run) return concerns(event) && elsewhere.get(event.run_id) !== event.status;
    run.status = event.status;
    run.updatedAt = event.timestamp;
    run.completedAt = isOver(event.status) ? (run.completedAt ?? event.timestamp) : null;
    run.latest = gist(event.data) || run.latest;
    return Boolean(filter.status) && event.status !== filter.status;
  }

  function concerns(event) {
    return Object.entries(filter).every(([name, value]) => !value || event[name] === value);
  }

  function happened({ detail: event }) {
    for (const meanwhile of meanwhiles) meanwhile.push(event);
    if (apply(event)) {
      if (!runs.has(event.run_id)) elsewhere.set(event.run_id, event.status);
      refresh();
    } else if (runs.has(event.run_id)) {
      draw();
    }
  }

  function start() {
    fill(state, skeleton(8));
    fill(trouble);
    offerOlder();
    refresh(true);
  }

  page.live.addEventListener("happened", happened, { signal: page.signal });
  page.live.addEventListener("opened", refresh, { signal: page.signal });
  // Rows that somebody else has written into the table are announced by nobody.
  every(60_000, refresh, page.signal);
  page.signal.addEventListener("abort", () => asked.abort());

  return {
    element,
    show(wish) {
      filter = wish;
      runs = new Map();
      elsewhere = new Map();
      next = null;
      wanted = PAGE;
      asked.abort();
      asked = new AbortController();
      draw();
      start();
    },
  };
}

/** What a run has said last, worked out once for each answer: results may be long. */
const latest = ({ metadata: { error, result, logs } }) => gist(error ?? result ?? logs.at(-1));

function head() {
  const names = ["Status", "Run", "Latest", "Workflow", "Started", "Duration"];
  const cells = names.map((name) => h("th", { scope: "col", role: "columnheader" }, name));
  return h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, cells));
}

function row(run, page) {
  const status = badge(run.status);
  const took = lasting(run.createdAt, run.completedAt);
  const said = h("span", { class: "latest" });
  const cell = (kind, ...parts) => h("td", { role: "cell", class: `cell-${kind}` }, parts);
  const element = h(
    "tr",
    { role: "row" },
    cell("status", status.element),
    cell(
      "run",
      h("a", { href: address("run", run.runId), class: "stretched" }, run.name || "Run"),
      h("code", { title: `${run.contextId}\nrun ${run.runId}` }, middle(run.contextId, 28)),
    ),
    cell("latest", said),
    cell("workflow", page.workflowName(run.workflowId)),
    cell("started", when(run.createdAt)),
    cell("duration", took.element),
  );
  let shown = run.status;
  const update = (now) => {
    status.update(now.status);
    took.update(now.createdAt, now.completedAt);
    if (said.title !== now.latest) said.title = now.latest;
    say(said, now.latest);
    element.dataset.status = now.status;
    if (shown !== now.status) element.classList.add("changed");
    shown = now.status;
  };
  element.addEventListener("animationend", () => element.classList.remove("changed", "new"));
  if (Date.now() - new Date(run.createdAt) < 5000) element.classList.add("new");
  return { element, update };
}

function empty({ context_id, workflow_id, status }) {
  if (context_id || workflow_id || status)
    return nothing("No runs match", "Nothing has this context, workflow and status.");
  return nothing("No runs yet", "They appear here as soon as a workflow is started.");
}
