/**
 * What runs ask to have approved: looked at, and decided.
 * @module
 */

import { page as pageOf, post, segment } from "./api.js";
import { fill, h, keyed, say } from "./dom.js";
import { isOver } from "./format.js";
import { badge, choice, failure, icon, id, lasting, notice, nothing, skeleton, when } from "./parts.js";
import { paced } from "./pacing.js";
import { address, go } from "./router.js";
import { table, value } from "./values.js";

const MOST = 100;
const MOST_DECIDED = 20; // of what is no longer waiting, on the page of what is

const STATES = {
  pending: { word: "Waiting", icon: "waiting" },
  approved: { word: "Approved", icon: "done" },
  rejected: { word: "Rejected", icon: "failed" },
  withdrawn: { word: "Withdrawn", icon: "stopped" },
};

const EMPTY = {
  pending: ["Nothing is waiting", "When a run asks for a decision, it appears here at once."],
  approved: ["Nothing was approved yet", ""],
  rejected: ["Nothing was rejected yet", ""],
  withdrawn: ["Nothing was withdrawn yet", "What a run asked is withdrawn when the run ends first."],
};

export const isAboutApproval = ({ event_type: type }) => ["pending_approval", "approved", "rejected"].includes(type);

/** Whether an event may change what is waiting: it is about an approval, or its run is over. */
export const concernsApprovals = (event) => isAboutApproval(event) || isOver(event.status);

/** @type {import("./main.js").View} */
export function show(place, page) {
  let asked = wish(place);
  /** @type {Map<string, any>} */
  let cards = new Map();
  const title = h("h1", { tabindex: -1 }, "Approvals");
  const kinds = Object.entries(STATES).map(([status, { word }]) => [status, word]);
  const states = choice("Which approvals", kinds, asked, (status) =>
    go("approvals", null, { status: status === "pending" ? "" : status }),
  );
  const list = h("div", { class: "stacked" });
  const state = h("div", {});
  const element = h("div", { class: "view" }, h("header", { class: "head" }, title, states.element), list, state);

  const read = paced(page.signal, 500, async () => {
    const status = asked;
    try {
      const found = await pageOf("/approvals", { status, limit: MOST }, page.signal);
      if (status !== asked) return read();
      cards = merged(cards, found.items, status);
      draw();
      fill(
        state,
        cards.size === 0 && nothing(...EMPTY[status]),
        found.next && h("p", { class: "quiet" }, `Only ${MOST} are shown.`),
      );
    } catch (error) {
      if (error.name !== "AbortError")
        fill(
          state,
          failure(error, () => read(true)),
        );
    }
  });

  const draw = () =>
    keyed(
      list,
      [...cards.values()],
      (approval) => approval.id,
      (approval) => card(approval, page, decided, read, goOn),
    );

  function decided(approval, changes) {
    cards.set(approval.id, { ...cards.get(approval.id), ...changes });
    draw();
  }

  /** After a decision, whose buttons are gone: takes a reader to what waits next. */
  function goOn(from, byKeyboard) {
    const waiting = [...list.querySelectorAll("[data-status=pending]")];
    const isAfter = (other) => from.compareDocumentPosition(other) & Node.DOCUMENT_POSITION_FOLLOWING;
    const next = waiting.find(isAfter)?.querySelector("h2") ?? title;
    next.focus({ preventScroll: !byKeyboard });
  }

  function changed(to) {
    asked = wish(to);
    states.update(asked);
    cards = new Map();
    draw();
    fill(state, skeleton(6));
    read(true);
  }

  function happened({ detail: event }) {
    const approval = cards.get(event.data?.approval_id);
    if (approval && ["approved", "rejected"].includes(event.event_type) && approval.status === "pending") {
      decided(approval, {
        status: event.event_type,
        comment: event.data.comment,
        decided_at: event.timestamp,
        elsewhere: true,
      });
    }
    if (concernsApprovals(event)) read();
  }

  page.live.addEventListener("happened", happened, { signal: page.signal });
  page.live.addEventListener("opened", read, { signal: page.signal });
  changed(place);
  return { element, title: "Approvals", heading: title, changed };
}

const wish = ({ params }) => (Object.hasOwn(STATES, params.status ?? "") ? params.status : "pending");

/**
 * What is waiting now, and what was waiting when it came onto the page: whoever reads it is told what became of it.
 * Each stays in its place, so that nobody presses a button that was another's a moment ago.
 */
function merged(before, found, status) {
  const now = new Map(found.map((approval) => [approval.id, approval]));
  if (status !== "pending") return now;
  const there = [...before.values()].map((approval) => {
    if (approval.status !== "pending") return approval;
    return now.get(approval.id) ?? { ...approval, status: "withdrawn", elsewhere: true };
  });
  const added = found.filter((approval) => !before.has(approval.id));
  const tooMany = there.filter((approval) => approval.status !== "pending").slice(0, -MOST_DECIDED);
  const left = there.filter((approval) => !tooMany.includes(approval));
  return new Map([...left, ...added].map((approval) => [approval.id, approval]));
}

function card(approval, page, decided, read, goOn) {
  const { rows = [], metadata = {}, displayFields = [] } = approval.approval_data ?? {};
  const name = text(metadata.title) || "Something is to be approved";
  const status = badge(approval.status, STATES);
  const took = lasting(approval.created_at, approval.decided_at);
  const waited = h("span", {}, "waited ", took.element);
  const form = decisionForm(approval, name, decided, read, goOn);
  const outcome = h("p", { class: "decided" });
  const element = h(
    "article",
    { class: "panel approval", "aria-labelledby": `approval-${approval.id}` },
    h("header", {}, h("h2", { id: `approval-${approval.id}`, tabindex: -1 }, name), status.element),
    metadata.description && h("p", {}, text(metadata.description)),
    h(
      "p",
      { class: "quiet facts" },
      h("span", {}, "Asked ", when(approval.created_at)),
      waited,
      h("span", {}, page.workflowName(approval.workflow_id)),
      h(
        "span",
        {},
        "context ",
        id(approval.context_id, 24, address("runs", null, { context_id: approval.context_id })),
      ),
      h("span", {}, "run ", id(approval.run_id, 14, address("run", approval.run_id))),
    ),
    content(rows, displayFields, name),
    more(metadata),
    form,
    outcome,
  );
  const update = (now) => {
    status.update(now.status);
    waited.hidden = !now.decided_at;
    took.update(now.created_at, now.decided_at);
    form.hidden = now.status !== "pending" || !page.may("decide");
    outcome.hidden = now.status === "pending";
    fill(outcome, told(now), now.comment && [" ", h("q", {}, now.comment)]);
    element.dataset.status = now.status;
  };
  return { element, update };
}

function told({ status, elsewhere, decided_at: moment }) {
  const at = moment ? [" ", when(moment)] : null;
  if (status === "withdrawn")
    return ["There is nothing to decide any more: it was decided elsewhere, or its run is over.", at];
  return [`${STATES[status]?.word ?? status}${elsewhere ? " elsewhere" : ""}`, at, "."];
}

/** What is to be looked at: usually rows, of which the workflow says what is to be shown. */
function content(rows, displayFields, caption) {
  const objects = rows.filter((row) => row !== null && typeof row === "object" && !Array.isArray(row));
  if (rows.length === 0) return h("p", { class: "none" }, "The run has sent nothing to look at.");
  if (objects.length < rows.length) return value(rows);
  const columns = displayFields.filter((name) => typeof name === "string");
  return value(rows, () => table(objects, columns, caption));
}

const KNOWN = ["title", "description", "requireComment", "totalRows", "allowBulkApproval"];

function more(metadata) {
  const others = Object.entries(metadata).filter(([name]) => !KNOWN.includes(name));
  return (
    others.length > 0 &&
    h("details", { class: "quiet" }, h("summary", {}, "More about it"), value(Object.fromEntries(others)))
  );
}

function decisionForm(approval, name, decided, read, goOn) {
  const required = approval.require_comment;
  const field = `comment-${approval.id}`;
  const comment = h("textarea", { id: field, rows: 2, required, "aria-describedby": `${field}-problem` });
  const problem = h("span", { id: `${field}-problem`, class: "problem", role: "alert" });
  const button = (verdict, word, look, shape) =>
    h(
      "button",
      {
        type: "button",
        class: `button ${look}`,
        "aria-label": `${word}: ${name}`,
        on: { click: (event) => decide(verdict, event) },
      },
      icon(shape),
      word,
    );
  const buttons = [button("approve", "Approve", "primary", "done"), button("reject", "Reject", "danger", "failed")];

  async function decide(verdict, { currentTarget: pressed, detail: clicks }) {
    const said = comment.value.trim();
    say(problem, required && !said ? "A comment is required." : "");
    comment.setAttribute("aria-invalid", String(required && !said));
    if (required && !said) return comment.focus();
    for (const each of buttons) each.disabled = true;
    try {
      const { status } = await post(`/approvals/${segment(approval.id)}/${verdict}`, said ? { comment: said } : {});
      decided(approval, { status, comment: said || null, decided_at: new Date().toISOString(), elsewhere: false });
      notice(status === "approved" ? "Approved" : "Rejected");
      if (document.activeElement === document.body) goOn(element, clicks === 0);
    } catch (error) {
      say(problem, error.status === 409 ? `${error.message}.` : error.message);
      if (error.status === 404 || error.status === 409) read();
    } finally {
      for (const each of buttons) each.disabled = false;
      if (document.activeElement === document.body) pressed.focus({ preventScroll: true });
    }
  }

  const element = h(
    "div",
    { class: "decision" },
    h("label", { for: field }, "Comment", h("span", { class: "quiet" }, required ? " (required)" : " (optional)")),
    comment,
    problem,
    h("div", { class: "actions start" }, buttons),
  );
  return element;
}

const text = (value) =>
  typeof value === "string" ? value : value === undefined || value === null ? "" : JSON.stringify(value);

/** What an approval is called, for a count of them. */
export const approvalsTitle = (count) => (count === 1 ? "1 approval is waiting" : `${count} approvals are waiting`);
