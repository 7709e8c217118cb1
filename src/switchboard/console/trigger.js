/**
 * Starting a workflow. However often the button is pressed, and whatever gets lost, somebody is called once.
 * @module
 */

import { send } from "./api.js";
import { fill, h, say } from "./dom.js";
import { doubt, isUnconfirmed, keyOf, settle } from "./intents.js";
import { icon, id, notice } from "./parts.js";
import { address, go } from "./router.js";

const NAMED = ["context_id", "workflow_id", "name", "description"];
const OURS = ["callback_url", "execution_id"];
const PATIENCE = 120_000; // milliseconds; HappyRobot may take its time

const KINDS = {
  text: { word: "Text", read: (text) => text },
  number: { word: "Number", read: readNumber },
  boolean: { word: "True or false", read: (text) => text === "true" },
  json: { word: "JSON", read: readJson },
};

function readNumber(text) {
  const read = Number(text);
  if (text.trim() === "" || !Number.isFinite(read)) throw new Error("This is not a number.");
  if (isRounded(read)) throw new Error("This is too long for a number: make it a text.");
  return read;
}

/** Numbers that would be sent as others are refused: looked for in the text, as what is read has them no more. */
function readJson(text) {
  const read = JSON.parse(text);
  const tokens = text.match(/"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*/g) ?? [];
  const long = tokens.find((token) => token[0] !== '"' && isRounded(Number(token)));
  if (long) throw new Error(`${long} is too long for a number: make it a text.`);
  return read;
}

const isRounded = (value) => !Number.isFinite(value) || (Number.isInteger(value) && !Number.isSafeInteger(value));

/** What was typed last and not started, for whoever has to sign in again meanwhile: at which address, and what. */
let draft = null;

/** Somebody else may come now. */
export function forgetDraft() {
  draft = null;
}

/** @type {import("./main.js").View} */
export function show({ params }, page) {
  let sending = false;
  /** The body, while it was the text that was typed last: what the fields make of it may differ. */
  let typed = null;

  const title = h("h1", { tabindex: -1 }, "Start a workflow");
  const inputs = {
    workflow_id: h("select", { id: "field-workflow_id", required: true }, page.workflows.map(option)),
    context_id: h("input", {
      id: "field-context_id",
      required: true,
      maxlength: 255,
      autocomplete: "off",
      value: params.context_id,
    }),
    name: h("input", { id: "field-name", maxlength: 255, autocomplete: "off" }),
    description: h("textarea", { id: "field-description", rows: 2 }),
  };
  const usable = page.workflows.filter((workflow) => workflow.active).map((workflow) => workflow.id);
  inputs.workflow_id.value = usable.includes(params.workflow_id) ? params.workflow_id : (usable[0] ?? "");

  const rows = h("div", { class: "field-rows" });
  const raw = h("textarea", {
    id: "raw",
    class: "code",
    rows: 14,
    spellcheck: "false",
    "aria-describedby": "raw-problem",
  });
  const rawProblem = h("p", { id: "raw-problem", class: "problem", role: "alert" });
  const summary = h("p", { class: "intent" });
  const outcome = h("div", { role: "status", tabindex: -1 });
  const submit = h("button", { type: "submit", class: "button primary" });

  const form = h(
    "form",
    { class: "columns form", novalidate: true, on: { submit: onSubmit } },
    h(
      "div",
      { class: "stacked" },
      h(
        "section",
        { class: "panel" },
        field("workflow_id", "Workflow", inputs.workflow_id),
        field("context_id", "Context id", inputs.context_id, "Your own id for what the call is about."),
        field("name", "Name", inputs.name, "Shown in lists. Optional."),
        field("description", "Description", inputs.description, "What this run is doing. Optional."),
      ),
      h(
        "fieldset",
        { class: "panel" },
        h("legend", {}, "Additional fields"),
        h("p", { class: "quiet" }, "Passed on to the workflow as they are."),
        rows,
        h(
          "button",
          { type: "button", class: "button small", on: { click: () => addRow().focus() } },
          icon("plus"),
          "Add a field",
        ),
      ),
    ),
    h(
      "div",
      { class: "stacked" },
      h(
        "section",
        { class: "panel" },
        h("header", {}, h("h2", {}, h("label", { for: "raw" }, "What is sent, as JSON"))),
        raw,
        rawProblem,
      ),
      h("section", { class: "panel sending", "aria-label": "Start" }, summary, outcome, submit),
    ),
  );

  form.addEventListener("input", ({ target }) => {
    if (target === raw) readRaw();
    else writeRaw();
    changed();
    remember(target === raw);
  });

  function addRow(name = "", kind = "text", text = "") {
    const nameInput = h("input", {
      class: "row-name",
      placeholder: "name",
      "aria-label": "Field name",
      autocomplete: "off",
      value: name,
    });
    const kindInput = h(
      "select",
      { class: "row-kind", "aria-label": "Type" },
      Object.entries(KINDS).map(([each, { word }]) => h("option", { value: each }, word)),
    );
    kindInput.value = kind;
    const place = h("span", { class: "row-place" }, valueInput(kind, text));
    // Before the form hears of it.
    kindInput.addEventListener("input", () => fill(place, valueInput(kindInput.value, place.firstChild.value)));
    const problem = h("span", { class: "problem" });
    const remove = h(
      "button",
      { type: "button", class: "button bare", "aria-label": "Remove this field", title: "Remove this field" },
      icon("remove"),
    );
    const row = h("div", { class: "field-row" }, nameInput, kindInput, place, remove, problem);
    remove.addEventListener("click", () => {
      row.remove();
      writeRaw();
      changed();
      remember(false);
    });
    rows.append(row);
    return nameInput;
  }

  /** A row's name, type and text. */
  const entered = (row) => [
    row.querySelector(".row-name").value,
    row.querySelector(".row-kind").value,
    row.querySelector(".row-place").firstChild.value,
  ];

  function remember(asText) {
    const named = NAMED.map((name) => [name, inputs[name].value]);
    draft = { address: location.hash, named, rows: [...rows.children].map(entered), text: asText ? raw.value : null };
  }

  function recall() {
    for (const [name, text] of draft.named) inputs[name].value = text;
    for (const row of draft.rows) addRow(...row);
    if (draft.text === null) return writeRaw();
    raw.value = draft.text;
    readRaw();
  }

  /** The body as the fields have it; what is wrong is said beside them. */
  function fromFields() {
    const body = Object.create(null); // any name may be a field's
    for (const name of NAMED) if (inputs[name].value.trim() !== "") body[name] = inputs[name].value.trim();
    let good = true;
    for (const row of rows.children) {
      const [untrimmed, kind, text] = entered(row);
      const name = untrimmed.trim();
      let wrong = "";
      if (name === "" && text === "") continue;
      if (name === "") wrong = "It has no name.";
      else if (NAMED.includes(name)) wrong = "This one has a field of its own above.";
      else if (OURS.includes(name)) wrong = "Switchboard sets this one itself.";
      else if (name in body) wrong = "There is one with this name already.";
      else {
        try {
          body[name] = KINDS[kind].read(text);
        } catch (error) {
          wrong = error instanceof SyntaxError ? "This is not JSON." : error.message;
        }
      }
      say(row.querySelector(".problem"), wrong);
      good &&= wrong === "";
    }
    return good ? body : null;
  }

  function writeRaw() {
    typed = null;
    const body = fromFields();
    if (body === null) return;
    raw.value = JSON.stringify(body, null, 2);
    say(rawProblem, "");
  }

  function readRaw() {
    typed = null;
    let body;
    try {
      body = readJson(raw.value);
    } catch (error) {
      return say(rawProblem, error instanceof SyntaxError ? "This is not JSON yet." : error.message);
    }
    const wrong = problemOf(body);
    say(rawProblem, wrong);
    if (wrong) return;
    typed = body;
    for (const name of NAMED) inputs[name].value = body[name] ?? (name === "workflow_id" ? "default" : "");
    fill(rows);
    for (const [name, value] of Object.entries(body)) if (!NAMED.includes(name)) addRow(name, ...written(value));
  }

  function problemOf(body) {
    if (body === null || typeof body !== "object" || Array.isArray(body)) return "It must be an object.";
    const odd = NAMED.find((name) => name in body && typeof body[name] !== "string");
    if (odd) return `${odd} must be a text.`;
    const ours = OURS.find((name) => name in body);
    if (ours) return `Switchboard sets ${ours} itself.`;
    if (body.workflow_id && !page.workflows.some(({ id: known }) => known === body.workflow_id))
      return "There is no such workflow.";
    return "";
  }

  const bodyNow = () => typed ?? fromFields();

  function changed() {
    fill(outcome, isUnconfirmed(bodyNow()) && warning(...UNCONFIRMED));
    showIntent();
  }

  function showIntent() {
    const workflow = inputs.workflow_id.value;
    const name = page.workflowName(workflow);
    const about = inputs.context_id.value.trim();
    fill(
      summary,
      workflow
        ? ["This starts ", h("b", {}, name), about && [" for ", h("b", {}, about)], ". Somebody may be called."]
        : "There is no active workflow that could be started.",
    );
    fill(submit, icon("phone"), sending ? "Starting …" : `Start “${name}”`);
    submit.disabled = sending || !workflow || isUnconfirmed(bodyNow());
    form.inert = sending; // what is being sent stays as it is
  }

  function onSubmit(event) {
    event.preventDefault();
    if (sending) return;
    const body = bodyNow();
    for (const name of ["workflow_id", "context_id"]) {
      const missing = inputs[name].value.trim() === "";
      inputs[name].setAttribute("aria-invalid", String(missing));
      say(document.getElementById(`problem-${name}`), missing ? "This is required." : "");
    }
    const wrong = firstWrong();
    if (wrong) wrong.focus();
    else place(body);
  }

  /** Where somebody has to look before this can be sent. */
  function firstWrong() {
    const row = [...rows.children].find((each) => each.querySelector(".problem").textContent);
    return (
      form.querySelector("[aria-invalid=true]") ?? row?.querySelector("input") ?? (rawProblem.textContent ? raw : null)
    );
  }

  async function place(body) {
    sending = true;
    fill(outcome);
    showIntent();
    const askToStay = (event) => event.preventDefault(); // whoever closes the page does not learn what becomes of it
    addEventListener("beforeunload", askToStay);
    try {
      const headers = { "Idempotency-Key": keyOf(body) };
      // Not given up when somebody looks elsewhere: what has been sent cannot be taken back.
      const { run_ids: started } = (await send("POST", "/trigger", { body, headers, patience: PATIENCE })).body;
      settle(body);
      forgetDraft();
      notice(started.length === 1 ? "The run has started" : `${started.length} runs have started`);
      if (!page.signal.aborted) arrive(started, body.context_id);
    } catch (error) {
      if (error.body.status === "submission_unknown") doubt(body);
      if (error.body.status === "failed") settle(body); // its key stands for what has failed
      tell(error, body.context_id);
    } finally {
      removeEventListener("beforeunload", askToStay);
    }
    sending = false;
    showIntent();
    outcome.focus(); // nothing has come of it; otherwise this is no longer on the page
  }

  function arrive(started, contextId) {
    if (started.length === 1) go("run", started[0]);
    else go("runs", null, { context_id: contextId });
  }

  function tell(error, contextId) {
    const [what, then] = meaning(error);
    if (page.signal.aborted) return notice(`About ${contextId}: ${what} ${then}`, { bad: true });
    const { detail, execution_id: execution, run_ids: runs = [] } = error.body;
    fill(
      outcome,
      warning(
        what,
        then,
        detail && h("p", { class: "quiet" }, detail),
        execution && h("p", { class: "quiet" }, "Execution ", id(execution)),
        runs.map((run) => h("a", { href: address("run", run) }, id(run).firstChild)),
      ),
    );
  }

  if (draft?.address === location.hash) recall();
  else fromParams(params);
  changed();
  return {
    element: h("div", { class: "view" }, h("header", { class: "head" }, title), form),
    title: "Start a workflow",
    heading: title,
  };

  function fromParams({ context_id: _, workflow_id: __, ...more }) {
    for (const [name, text] of Object.entries(more)) {
      if (NAMED.includes(name)) inputs[name].value = text;
      else addRow(name, "text", text);
    }
    writeRaw();
  }
}

const UNCONFIRMED = [
  "The call may have been placed: do not send it again.",
  "HappyRobot took the request and did not answer. The run appears in the list when it calls back.",
];

/** What it means that nothing has started, and what to do now. */
function meaning({ status, message, body }) {
  if (body.status === "submission_unknown") return UNCONFIRMED;
  if (body.status === "failed") return [`${message}: nobody was called.`, "You can send it again."];
  if (body.status === "pending")
    return [`${message}.`, "Send it again to see what became of it; nobody is called twice."];
  if (status === 0 || status >= 500)
    return [
      message,
      "It may have been sent. Send it again as it is, and nobody is called twice; changed, it is another call.",
    ];
  if (status === 422) return [`${message}.`, "It may have been sent before, in another form: look for its run first."];
  return [`${message}.`, "Nobody was called."];
}

function option({ id: workflow, name, active }) {
  return h("option", { value: workflow, disabled: !active }, `${name ?? workflow}${active ? "" : " (inactive)"}`);
}

function field(name, word, input, hint = "") {
  input.setAttribute("aria-describedby", `hint-${name} problem-${name}`);
  return h(
    "div",
    { class: "field" },
    h("label", { for: input.id }, word),
    input,
    h("span", { id: `hint-${name}`, class: "quiet" }, hint),
    h("span", { id: `problem-${name}`, class: "problem" }),
  );
}

function valueInput(kind, text) {
  const attributes = { "aria-label": "Value", placeholder: "value", autocomplete: "off" };
  if (kind === "number") return h("input", { ...attributes, value: text, inputmode: "decimal" });
  // Of one row, and yet not an `input`, which would take the lines out of a text.
  if (kind !== "boolean") return h("textarea", { ...attributes, rows: 1 }, text);
  const select = h(
    "select",
    { "aria-label": "Value" },
    ["true", "false"].map((word) => h("option", { value: word }, word)),
  );
  select.value = text === "false" ? "false" : "true";
  return select;
}

/** The type and the text of a row for a value. */
function written(value) {
  if (typeof value === "string") return ["text", value];
  if (typeof value === "number") return ["number", String(value)];
  return typeof value === "boolean" ? ["boolean", String(value)] : ["json", JSON.stringify(value)];
}

function warning(what, ...more) {
  return h(
    "div",
    { class: "warning" },
    h("p", {}, icon("failed"), h("b", {}, what)),
    more.map((part) => (typeof part === "string" ? h("p", {}, part) : part)),
  );
}
