/**
 * What happened to a run, as it happens: read page by page, continued by the stream, nothing missing and nothing twice.
 * @module
 */

import { page as pageOf, segment } from "./api.js";
import { fill, h, keyed } from "./dom.js";
import { clock, exact, gist, number } from "./format.js";
import { failure, nothing, skeleton } from "./parts.js";
import { paced, perFrame } from "./pacing.js";
import { json } from "./values.js";

const PAGE = 1000;
const DRAWN = 200; // the newest of so many are on the page, until somebody asks for more

/**
 * @param {string} runId
 * @param {import("./main.js").Page} page
 */
export function timeline(runId, page) {
  /** @type {import("./live.js").RunEvent[]} By id. */
  let events = [];
  let waiting = [];
  /** @type {"reading" | "complete" | "failed"} */
  let progress = "reading";
  let drawn = DRAWN;

  const list = h("ol", { class: "timeline", "aria-label": "Events, oldest first" });
  const earlier = h("button", { type: "button", class: "button small", hidden: true, on: { click: showEarlier } });
  const state = h("div", {}, skeleton(6));
  const count = h("span", { class: "quiet number" });
  const element = h(
    "section",
    { class: "panel", "aria-labelledby": "timeline-title" },
    h("header", {}, h("h2", { id: "timeline-title" }, "Timeline"), count),
    earlier,
    list,
    state,
  );

  const draw = perFrame(() => {
    const hidden = Math.max(0, events.length - drawn);
    keyed(list, events.slice(hidden), (event) => String(event.id), entry);
    fill(count, `${number(events.length)} ${events.length === 1 ? "event" : "events"}`);
    earlier.hidden = hidden === 0;
    fill(earlier, `Show ${number(Math.min(hidden, DRAWN))} earlier of ${number(hidden)}`);
  });

  function showEarlier() {
    drawn += DRAWN;
    draw();
  }

  const newest = () => events.at(-1)?.id ?? 0;

  function add(more) {
    for (const event of more) {
      // Ids grow in the order in which events become visible: what is not greater is here already.
      if (event.id <= newest()) continue;
      events.push(event);
    }
    draw();
  }

  /** Reads what comes after what is here, to the end. */
  const catchUp = paced(page.signal, 1000, async () => {
    progress = "reading";
    try {
      let next = null;
      do {
        const path = next ?? `/runs/${segment(runId)}/events`;
        const found = await pageOf(path, next ? {} : { after: newest(), limit: PAGE }, page.signal);
        add(found.items);
        next = found.next;
      } while (next);
      progress = "complete";
      add(waiting);
      waiting = [];
      fill(state, events.length === 0 && nothing("Nothing yet", "HappyRobot has not said anything about this run."));
    } catch (error) {
      if (error.name === "AbortError") return;
      progress = "failed";
      fill(
        state,
        failure(error, () => catchUp(true)),
      );
    }
  });

  function happened({ detail: event }) {
    if (event.run_id !== runId) return;
    if (progress === "complete") {
      fill(state);
      return add([event]);
    }
    waiting.push(event); // it comes after what is being read
    if (progress === "failed") catchUp();
  }

  page.live.addEventListener("happened", happened, { signal: page.signal });
  page.live.addEventListener("opened", catchUp, { signal: page.signal });
  catchUp();
  return element;
}

function entry(event) {
  const open = h(
    "details",
    {},
    h(
      "summary",
      {},
      h("time", { datetime: event.timestamp, title: exact(event.timestamp) }, clock(event.timestamp)),
      h("span", { class: "event-type", data: { type: event.event_type } }, event.event_type),
      h("span", { class: "event-gist" }, gist(event.data)),
    ),
  );
  // Most are never looked into.
  open.addEventListener("toggle", () => open.childElementCount > 1 || open.append(json(event)), { once: true });
  return { element: h("li", { data: { status: event.status, type: event.event_type } }, open), update() {} };
}
