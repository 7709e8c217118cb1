/**
 * Webhooks to customers: whether they arrived, every attempt, and sending one again.
 * @module
 */

import { page as pageOf, post, segment } from "./api.js";
import { fill, h, keyed, say } from "./dom.js";
import { number } from "./format.js";
import { badge, choice, failure, icon, id, nothing, notice, skeleton, when, withButton } from "./parts.js";
import { every, paced } from "./pacing.js";
import { go } from "./router.js";

const PAGE = 50;
const MOST = 200; // as many as the API gives at once

const STATES = {
  pending: { word: "On its way", icon: "waiting" },
  delivered: { word: "Delivered", icon: "done" },
  failed: { word: "Failed", icon: "failed" },
};

/** @type {import("./main.js").View} */
export function show(place, page) {
  let asked = wish(place);
  /** @type {Map<string, any>} */
  let deliveries = new Map();
  let next = null;
  let wanted = PAGE;

  const title = h("h1", { tabindex: -1 }, "Deliveries");
  const kinds = [["", "All"], ...Object.entries(STATES).map(([status, { word }]) => [status, word])];
  const states = choice("Which deliveries", kinds, asked, (status) => go("deliveries", null, { status }));
  const body = h("tbody", { role: "rowgroup" });
  const names = ["Status", "Event", "Execution", "Attempts", "Written", ""];
  const head = h(
    "tr",
    { role: "row" },
    names.map((word) =>
      h("th", { scope: "col", role: "columnheader" }, word || h("span", { class: "unseen" }, "Actions")),
    ),
  );
  const list = h(
    "table",
    { class: "list deliveries", role: "table", "aria-label": "Deliveries", hidden: true },
    h("thead", { role: "rowgroup" }, head),
    body,
  );
  const state = h("div", {});
  const trouble = h("div", {});
  const shown = h("span", { class: "quiet" });
  const load = h(
    "button",
    { type: "button", class: "button", hidden: true, on: { click: () => withButton(load, older) } },
    "Load older",
  );
  const element = h(
    "div",
    { class: "view" },
    h("header", { class: "head" }, title, states.element),
    h("p", { class: "quiet" }, "Webhooks that tell customers what became of their executions."),
    list,
    state,
    h("div", { class: "more" }, trouble, shown, load),
  );

  const read = paced(page.signal, 1000, async () => {
    const status = asked;
    try {
      const limit = wanted;
      const found = await pageOf("/deliveries", { status, limit }, page.signal);
      if (status !== asked || limit !== wanted) return read();
      take(found, new Map());
    } catch (error) {
      if (error.name === "AbortError") return;
      fill(
        deliveries.size === 0 ? state : trouble,
        failure(error, () => read(true)),
      );
    }
  });

  function take(found, before) {
    deliveries = new Map([...before.values(), ...found.items].map((delivery) => [delivery.id, delivery]));
    next = found.next;
    keyed(
      body,
      [...deliveries.values()],
      (delivery) => delivery.id,
      (delivery) => row(delivery, read),
    );
    list.hidden = deliveries.size === 0;
    fill(
      state,
      deliveries.size === 0 &&
        nothing(
          "No webhooks here",
          asked ? "None has this status." : "They appear when a customer's key has an address for webhooks.",
        ),
    );
    fill(trouble);
    offerOlder();
  }

  function offerOlder() {
    const full = next !== null && deliveries.size >= MOST;
    const count = `${number(deliveries.size)} shown, newest first`;
    say(shown, deliveries.size === 0 ? "" : full ? `${count}. Choose a status to see older ones.` : count);
    load.hidden = next === null || full;
  }

  async function older() {
    const status = asked;
    wanted = Math.min(MOST, deliveries.size + PAGE);
    const found = await pageOf(next, {}, page.signal);
    if (status === asked) take(found, deliveries);
  }

  function changed(to) {
    asked = wish(to);
    states.update(asked);
    deliveries = new Map();
    next = null;
    wanted = PAGE;
    list.hidden = true;
    fill(trouble);
    offerOlder();
    fill(state, skeleton(6));
    read(true);
  }

  // No event tells of deliveries. What is on its way is there, or not, within seconds.
  every(5000, read, page.signal);
  page.live.addEventListener("opened", read, { signal: page.signal });
  changed(place);
  return { element, title: "Deliveries", heading: title, changed };
}

const wish = ({ params }) => (Object.hasOwn(STATES, params.status ?? "") ? params.status : "");

function row(delivery, read) {
  const status = badge(delivery.status, STATES);
  const attempts = h("ol", { class: "attempts" });
  const count = h("summary", {});
  const last = h("span", { class: "quiet" });
  const again = h(
    "button",
    { type: "button", class: "button small", on: { click: send } },
    icon("again"),
    "Send again",
  );
  const cell = (kind, ...parts) => h("td", { role: "cell", class: `cell-${kind}` }, parts);
  const element = h(
    "tr",
    { role: "row" },
    cell("status", status.element),
    cell("run", h("span", { class: "event-name" }, delivery.event), h("span", { class: "quiet" }, delivery.key_name)),
    cell("workflow", id(delivery.execution_id, 14)),
    cell("latest", h("details", {}, count, attempts), last),
    cell("started", when(delivery.created_at)),
    cell("action", again),
  );

  function send() {
    withButton(again, async () => {
      await post(`/deliveries/${segment(delivery.id)}/redeliver`);
      notice("The webhook is on its way again");
      read(true);
    });
  }

  let shown = -1;
  const update = (now) => {
    status.update(now.status);
    again.hidden = now.status === "pending";
    say(last, now.attempts.at(-1)?.error ?? "");
    if (shown === now.attempts.length) return;
    shown = now.attempts.length;
    fill(count, `${shown} ${shown === 1 ? "attempt" : "attempts"}`);
    fill(attempts, now.attempts.map(attempt));
  };
  return { element, update };
}

function attempt({ number: place, started_at: started, duration_ms: took, status_code: code, response, error }) {
  return h(
    "li",
    { value: place },
    h("span", { class: code >= 200 && code < 300 ? "good" : "bad" }, code ? `HTTP ${code}` : "no answer"),
    " ",
    h("span", { class: "quiet" }, "after ", h("span", { class: "number" }, `${number(took)} ms`), ", ", when(started)),
    error && h("p", {}, error),
    response && h("pre", { class: "json" }, response),
  );
}
