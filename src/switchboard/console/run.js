/**
 * One run: where it stands, what is said and what happens, and what came of it.
 * @module
 */

import { get, send, segment } from "./api.js";
import { concernsApprovals } from "./approvals.js";
import { conversation } from "./conversation.js";
import { fill, h, say } from "./dom.js";
import { isOver } from "./format.js";
import { badge, confirmed, failure, icon, id, lasting, notice, skeleton, when, withButton } from "./parts.js";
import { every, paced } from "./pacing.js";
import { address } from "./router.js";
import { timeline } from "./timeline.js";
import { value } from "./values.js";

/** @type {import("./main.js").View} */
export function show({ id: runId }, page) {
  let run = null;
  const title = h("h1", { tabindex: -1 }, "Run");
  const status = badge("PENDING");
  status.element.hidden = true;
  const actions = h("div", { class: "actions" });
  const facts = h("dl", { class: "facts-grid" }, skeleton(2));
  const outcome = h("div", { class: "stacked" });
  const talk = conversation(runId, page);
  const trouble = h("div", {});
  const question = h("div", {});
  const parts = h(
    "div",
    { class: "columns" },
    h("div", { class: "stacked" }, outcome, talk.element),
    timeline(runId, page),
  );
  const element = h(
    "div",
    { class: "view" },
    h("a", { class: "up", href: address("runs") }, icon("back"), "All runs"),
    h("header", { class: "head" }, h("div", { class: "titled" }, title, status.element), actions),
    trouble,
    question,
    facts,
    parts,
  );

  const cancel = h(
    "button",
    { type: "button", class: "button danger", on: { click: askToCancel } },
    icon("stopped"),
    "Cancel run",
  );
  const took = lasting(new Date().toISOString(), null);

  const read = paced(page.signal, 500, async () => {
    try {
      const before = run;
      run = await get(`/runs/${segment(runId)}`, {}, page.signal);
      if (before === null) {
        introduce();
        look();
      }
      draw();
      if (before && !isOver(before.status) && isOver(run.status)) talk.refresh(true);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (run === null) parts.hidden = facts.hidden = error.status === 404;
      fill(
        trouble,
        failure(
          { message: error.status === 404 ? "There is no such run, or it is not yours to see." : error.message },
          () => read(true),
        ),
      );
    }
  });

  /** What stays as it is. */
  function introduce() {
    parts.hidden = facts.hidden = false;
    const name = run.name || "Run";
    say(title, name);
    document.title = `${name} · Switchboard`;
    const fact = (word, ...what) => h("div", {}, h("dt", {}, word), h("dd", {}, what));
    fill(
      facts,
      fact("Context", id(run.contextId, 26, address("runs", null, { context_id: run.contextId }))),
      fact(
        "Workflow",
        h("a", { href: address("runs", null, { workflow_id: run.workflowId }) }, page.workflowName(run.workflowId)),
      ),
      fact("Started", when(run.createdAt)),
      fact("Duration", took.element),
      fact("Run", id(run.runId)),
      run.executionId && fact("Execution", id(run.executionId)),
      run.description && fact("Description", run.description),
    );
  }

  let drawn = "";

  function draw() {
    fill(trouble);
    const over = isOver(run.status);
    status.element.hidden = false;
    status.update(run.status);
    took.update(run.createdAt, over ? (run.completedAt ?? run.updatedAt) : null);
    if (over) talk.offerRecordings();
    const { result = null, error = null } = run.metadata;
    const now = JSON.stringify([over, run.platformUrl, result, error]);
    if (now === drawn) return; // whoever reads or selects it is not disturbed
    drawn = now;
    fill(
      outcome,
      error !== null && panel("Error", error, "error"),
      result !== null && panel("Result", result, "result"),
    );
    fill(
      actions,
      run.platformUrl &&
        h(
          "a",
          { class: "button", href: run.platformUrl, target: "_blank", rel: "noreferrer" },
          "Open in HappyRobot",
          icon("out"),
        ),
      !over && page.may("trigger") && cancel,
    );
  }

  const look = paced(page.signal, 1000, async () => {
    try {
      const waiting = run === null ? [] : await get("/approvals", { context_id: run.contextId }, page.signal);
      fill(
        question,
        waiting.some((approval) => approval.run_id === runId) &&
          h(
            "p",
            { class: "hint" },
            icon("waiting"),
            "This run waits for a decision.",
            h("a", { href: address("approvals") }, "Look at it"),
          ),
      );
    } catch {
      // It is only a hint; the count beside "Approvals" says the same.
    }
  });

  async function askToCancel() {
    const sure = await confirmed({
      title: "Cancel this run?",
      text: "HappyRobot is asked to stop it. Somebody who is on the phone is cut off.",
      action: "Cancel run",
      keep: "Let it go on",
      signal: page.signal,
    });
    if (!sure) return;
    title.focus(); // the button may be gone when this is over
    await withButton(cancel, async () => {
      // Not given up when somebody looks elsewhere, and told them there.
      const answer = (await send("POST", `/runs/${segment(runId)}/cancel`)).body;
      notice(
        answer.status === "canceled"
          ? "The run is canceled"
          : "HappyRobot has been asked, and has not confirmed it yet",
      );
    });
    read(true);
  }

  // The stream says that something has changed; what it is, the run itself says.
  const happened = ({ detail: event }) => {
    if (event.run_id !== runId) return;
    if (event.event_type !== "log") talk.refresh();
    if (event.event_type !== "log" || event.status !== run?.status) read();
    if (concernsApprovals(event)) look();
  };
  page.live.addEventListener("happened", happened, { signal: page.signal });
  page.live.addEventListener("opened", read, { signal: page.signal });
  page.live.addEventListener("opened", look, { signal: page.signal });
  every(30_000, read, page.signal); // a stream can be dead without a sign of it
  read();
  return { element, title: "Run", heading: title };
}

function panel(name, what, kind) {
  return h(
    "section",
    { class: "panel", data: { kind }, "aria-labelledby": `${kind}-title` },
    h("header", {}, h("h2", { id: `${kind}-title` }, name)),
    value(what),
  );
}
