/**
 * All runs: how many there are and how long they take, and the list of them.
 * @module
 */

import { get } from "./api.js";
import { durationsChart, runsChart } from "./charts.js";
import { fill, h, say } from "./dom.js";
import { duration, number, STATUSES } from "./format.js";
import { choice, failure, icon } from "./parts.js";
import { every, paced } from "./pacing.js";
import { go } from "./router.js";
import { runList } from "./runlist.js";

const WINDOWS = { 24: "24 h", 168: "7 d", 720: "30 d" };
const SPANS = { 24: "24 hours", 168: "7 days", 720: "30 days" };
const FILTERS = ["context_id", "workflow_id", "status"];

/** @type {import("./main.js").View} */
export function show(place, page) {
  let asked = wish(place);
  const change = (changes) => go("runs", null, given({ ...asked, ...changes }));

  const title = h("h1", { tabindex: -1 }, "Runs");
  const span = choice("Time window", Object.entries(WINDOWS), asked.hours, (hours) => change({ hours }));
  const numbers = statusFilter((status) => change({ status }));
  const charts = [runsChart(), durationsChart()];
  const trouble = h("div", {});
  const filters = filterBar(page, change);
  const list = runList(page);
  const listTitle = h("span", {});
  const within = h("p", { id: "within", class: "quiet within" });
  const element = h(
    "div",
    { class: "view" },
    h("header", { class: "head" }, title, span.element),
    within,
    numbers.element,
    trouble,
    h(
      "div",
      { class: "charts" },
      charts.map((chart) => chart.element),
    ),
    h(
      "section",
      { "aria-labelledby": "list-title" },
      h(
        "header",
        { class: "head" },
        h("h2", { id: "list-title" }, listTitle, h("span", { class: "quiet" }, " of all time")),
        filters.element,
      ),
      list.element,
    ),
  );

  const readStats = paced(page.signal, 2000, async () => {
    const wanted = asked;
    const { hours, context_id, workflow_id } = wanted;
    try {
      const stats = await get("/stats", { hours, context_id, workflow_id }, page.signal);
      if (wanted !== asked) return;
      numbers.update(stats);
      for (const chart of charts) chart.update(stats.by_hour);
      fill(trouble);
    } catch (error) {
      if (error.name !== "AbortError")
        fill(
          trouble,
          failure(error, () => readStats(true)),
        );
    }
  });

  function changed(to) {
    const before = asked;
    asked = wish(to);
    span.update(asked.hours);
    say(within, `Started in the last ${SPANS[asked.hours]}`);
    numbers.choose(asked.status);
    filters.update(asked);
    say(listTitle, asked.status ? `${STATUSES[asked.status].word} runs` : "All runs");
    if (to === place || FILTERS.some((name) => before[name] !== asked[name])) {
      list.show(Object.fromEntries(FILTERS.map((name) => [name, asked[name]])));
    }
    readStats(true);
  }

  const happened = ({ detail }) => detail.event_type === "log" || readStats();
  page.live.addEventListener("happened", happened, { signal: page.signal });
  page.live.addEventListener("opened", readStats, { signal: page.signal });
  every(60_000, readStats, page.signal); // time goes on, even where nothing happens
  changed(place);
  return { element, title: "Runs", heading: title, changed };
}

/** What an address asks for; what it must not is as if it were not there. */
function wish({ params }) {
  const status = (params.status ?? "").toUpperCase();
  return {
    context_id: params.context_id ?? "",
    workflow_id: params.workflow_id ?? "",
    status: Object.hasOwn(STATUSES, status) ? status : "",
    hours: Object.hasOwn(WINDOWS, params.hours) ? params.hours : "24",
  };
}

const given = ({ hours, ...filter }) => ({ ...filter, hours: hours === "24" ? "" : hours });

const ORDER = ["RUNNING", "COMPLETED", "FAILED", "CANCELED", "PENDING"];

/** How many runs there are of each status; the numbers are buttons that narrow the list. */
function statusFilter(choose) {
  const kinds = [["", { word: "All runs", icon: "runs" }], ...ORDER.map((status) => [status, STATUSES[status]])];
  const parts = new Map(
    kinds.map(([status]) => [
      status,
      {
        count: h("span", { class: "count number" }, "–"),
        note: h("span", { class: "quiet number" }, "\u00a0"),
      },
    ]),
  );
  const buttons = kinds.map(([status, { word, icon: shape }]) =>
    h(
      "button",
      { type: "button", class: "stat", data: { status }, on: { click: () => choose(status) } },
      h("span", { class: "stat-word" }, icon(shape), word),
      parts.get(status).count,
      parts.get(status).note,
    ),
  );
  return {
    element: h(
      "div",
      { class: "stats", role: "group", "aria-label": "Filter by status", "aria-describedby": "within" },
      buttons,
    ),
    choose(now) {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.status === now));
    },
    update({ total, by_status: counts, durations, under_way: underWay }) {
      const write = (status, count, note) => {
        say(parts.get(status).count, number(count));
        say(parts.get(status).note, note || "\u00a0");
      };
      write("", total, durations.runs ? `typically ${duration(durations.p50)}` : "");
      for (const status of ORDER) write(status, counts[status] ?? 0, share(counts[status] ?? 0, total));
      const before = underWay - counts.RUNNING - counts.PENDING;
      write("RUNNING", counts.RUNNING, before > 0 ? `and ${number(before)} from before` : "");
    },
  };
}

const share = (part, whole) => (part && whole ? `${((100 * part) / whole).toFixed(part === whole ? 0 : 1)} %` : "");

function filterBar(page, change) {
  const context = h("input", {
    type: "search",
    id: "context",
    placeholder: "Context id",
    autocomplete: "off",
    spellcheck: "false",
  });
  const workflow = h("select", { id: "workflow" });
  const clear = h(
    "button",
    {
      type: "button",
      class: "button small",
      on: { click: () => change({ context_id: "", workflow_id: "", status: "" }) },
    },
    icon("remove"),
    "Clear filters",
  );
  context.addEventListener("change", () => change({ context_id: context.value.trim() }));
  workflow.addEventListener("change", () => change({ workflow_id: workflow.value }));
  const element = h(
    "div",
    { class: "filters", role: "search", "aria-label": "Runs" },
    h("label", { class: "unseen", for: "context" }, "Context id"),
    context,
    h("label", { class: "unseen", for: "workflow" }, "Workflow"),
    workflow,
    clear,
  );
  return {
    element,
    update({ context_id, workflow_id, status }) {
      context.value = context_id;
      const known = page.workflows.map(({ id, name }) => [id, name ?? id]);
      if (workflow_id && !known.some(([id]) => id === workflow_id)) known.push([workflow_id, workflow_id]);
      fill(
        workflow,
        h("option", { value: "" }, "All workflows"),
        known.map(([id, name]) => h("option", { value: id }, name)),
      );
      workflow.value = workflow_id;
      clear.hidden = !(context_id || workflow_id || status);
    },
  };
}
