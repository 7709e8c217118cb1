/**
 * What HappyRobot knows about a run: the conversation, outputs, issues, and recordings.
 * @module
 */

import { get, segment } from "./api.js";
import { fill, h, say } from "./dom.js";
import { clock, duration, exact, heading } from "./format.js";
import { failure, icon, nothing, skeleton, withButton } from "./parts.js";
import { paced } from "./pacing.js";
import { value } from "./values.js";

const ROLES = { assistant: "Agent", user: "Person", tool: "Tool", event: "Event" };

/**
 * @param {string} runId
 * @param {import("./main.js").Page} page
 * @returns {{ element: Element, refresh(hurry?: boolean): void, offerRecordings(): void }}
 */
export function conversation(runId, page) {
  const body = h("div", {}, skeleton(6));
  const source = h("span", { class: "quiet" });
  const again = h(
    "button",
    {
      type: "button",
      class: "button bare tiny",
      "aria-label": "Read the conversation again",
      title: "Read the conversation again",
      on: { click: () => refresh(true) },
    },
    icon("again"),
  );
  const talk = h(
    "section",
    { class: "panel", "aria-labelledby": "talk-title" },
    h("header", {}, h("h2", { id: "talk-title" }, "Conversation"), source, again),
    body,
  );
  const sound = recordings(runId, page);
  const extras = h("div", { class: "stacked" });
  let drawn = "";

  const refresh = paced(page.signal, 10_000, async () => {
    try {
      const details = await get(`/runs/${segment(runId)}/details`, {}, page.signal);
      say(
        source,
        details.source === "database"
          ? "as kept here; HappyRobot was not asked or has forgotten it"
          : "from HappyRobot",
      );
      const now = JSON.stringify(details);
      if (now === drawn) return; // whoever reads or selects it is not disturbed
      drawn = now;
      fill(body, sessions(details));
      fill(extras, outputs(details.outputs), issues(details.issues), about(details));
    } catch (error) {
      if (error.name === "AbortError") return;
      if (drawn) return say(source, `could not be read again: ${why(error)}`);
      fill(body, failure({ message: why(error) }, error.status === 409 ? null : () => refresh(true)));
    }
  });

  refresh();
  return {
    element: h("div", { class: "stacked" }, talk, sound.element, extras),
    refresh,
    offerRecordings: sound.offer,
  };
}

function why({ status, message }) {
  if (status === 409) return "HappyRobot cannot be asked about conversations: HAPPYROBOT_API_KEY is not set.";
  if (status === 404) return "HappyRobot does not know this run, and nothing of it is kept here.";
  if (status === 503)
    return `HappyRobot does not answer at the moment, and nothing of the run is kept here yet. (${message})`;
  return message;
}

function sessions({ sessions: all }) {
  if (all.length === 0) return nothing("No conversation yet", "It is shown once the agent and the caller have spoken.");
  return all.map((session) => {
    const facts = [
      session.type,
      session.status,
      session.user_number,
      session.duration !== null && duration(session.duration),
      session.failure_reason ??
        (session.sip_code && session.sip_code !== "200" && `SIP ${session.sip_code} ${session.sip_reason ?? ""}`),
    ];
    return h(
      "div",
      { class: "session" },
      h(
        "p",
        { class: "quiet facts" },
        facts.filter(Boolean).map((fact) => h("span", {}, fact)),
      ),
      session.messages.length
        ? h("ol", { class: "talk", "aria-label": "Transcript" }, session.messages.map(message))
        : h("p", { class: "quiet" }, "Nothing was said."),
    );
  });
}

function message(said) {
  const role = said.role ?? "event";
  const who = role === "tool" && said.name ? `Tool ${said.name}` : (ROLES[role] ?? role);
  const notes = [said.interrupted && "interrupted", said.filler && "filler"].filter(Boolean).join(", ");
  return h(
    "li",
    { class: "said", data: { role } },
    h(
      "p",
      { class: "who" },
      h("b", {}, who),
      said.timestamp && h("time", { datetime: said.timestamp, title: exact(said.timestamp) }, clock(said.timestamp)),
      notes && h("span", { class: "quiet" }, notes),
    ),
    said.data_deleted && !said.content && h("p", { class: "none" }, "HappyRobot no longer keeps this."),
    said.content && h("p", { class: "words" }, said.content),
    said.tool_calls.map((call) =>
      h("div", { class: "call" }, h("code", {}, call.name ?? "tool"), value(parsed(call.arguments))),
    ),
  );
}

/** A tool's arguments are often JSON in a text. */
function parsed(argument) {
  if (typeof argument !== "string") return argument;
  try {
    return JSON.parse(argument);
  } catch {
    return argument;
  }
}

function outputs(all) {
  if (all.length === 0) return null;
  return h(
    "details",
    { class: "panel folded" },
    h("summary", {}, h("h2", {}, `Outputs (${all.length})`)),
    all.map((output) =>
      h(
        "div",
        { class: "output" },
        h(
          "h3",
          {},
          output.name ?? output.event ?? "Output",
          " ",
          h("span", { class: "quiet" }, [output.integration, output.event].filter(Boolean).join(" · ")),
        ),
        output.error &&
          h(
            "p",
            { class: "failure" },
            icon("failed"),
            typeof output.error === "string" ? output.error : JSON.stringify(output.error),
          ),
        output.data_deleted ? h("p", { class: "none" }, "HappyRobot no longer keeps this.") : value(output.data),
      ),
    ),
  );
}

function issues(all) {
  if (all.length === 0) return null;
  return h(
    "section",
    { class: "panel", "aria-labelledby": "issues-title" },
    h("header", {}, h("h2", { id: "issues-title" }, `Issues (${all.length})`)),
    h(
      "ul",
      { class: "values" },
      all.map((issue) =>
        h(
          "li",
          {},
          h("b", {}, heading(issue.type ?? "issue")),
          " ",
          h(
            "span",
            { class: "quiet" },
            [issue.status, issue.priority && `${issue.priority} priority`].filter(Boolean).join(", "),
          ),
          issue.correction && h("p", {}, issue.correction),
          issue.correction_reason && h("p", { class: "quiet" }, issue.correction_reason),
        ),
      ),
    ),
  );
}

function about({ annotation, version }) {
  if (!annotation && !version) return null;
  const name =
    version && [version.name, version.number !== null && `version ${version.number}`].filter(Boolean).join(", ");
  return h(
    "p",
    { class: "quiet facts" },
    name && h("span", {}, `Ran ${name}`),
    annotation && h("span", {}, `Marked ${annotation}`),
  );
}

/** Links to recordings expire: they are asked for when somebody wants to listen. */
function recordings(runId, page) {
  const body = h("div", { "aria-live": "polite" });
  const ask = h(
    "button",
    { type: "button", class: "button", on: { click: () => withButton(ask, load) } },
    icon("phone"),
    "Get recordings",
  );
  const element = h(
    "section",
    { class: "panel", "aria-labelledby": "sound-title", hidden: true },
    h("header", {}, h("h2", { id: "sound-title" }, "Recordings"), ask),
    body,
  );

  async function load() {
    try {
      const found = (await get(`/runs/${segment(runId)}/recordings`, {}, page.signal)).recordings;
      const player = ({ url }, at) =>
        h("audio", { controls: true, preload: "metadata", src: url, "aria-label": `Recording ${at + 1}` });
      fill(body, found.length ? found.map(player) : h("p", { class: "quiet" }, "There are none."));
      for (const sound of body.querySelectorAll("audio")) {
        sound.addEventListener("error", () =>
          sound.replaceWith(h("p", { class: "quiet" }, "It cannot be played; its link may have expired.")),
        );
      }
    } catch (error) {
      if (error.name !== "AbortError") fill(body, failure({ message: why(error) }));
    }
  }
  return { element, offer: () => (element.hidden = false) };
}
