/**
 * The door: an API key, which is exchanged for a cookie and forgotten.
 * @module
 */

import { h, say } from "./dom.js";
import { signIn } from "./session.js";

/**
 * @param {string} why Why somebody is asked, if they were in before.
 * @param {(session: import("./session.js").Session) => void} enter
 */
export function door(why, enter) {
  const title = h("h1", { tabindex: -1 }, "Sign in");
  const key = h("input", {
    id: "key",
    type: "password",
    required: true,
    autocomplete: "off",
    spellcheck: "false",
    autocapitalize: "off",
    "aria-describedby": "why key-problem key-hint",
  });
  const problem = h("p", { id: "key-problem", class: "problem", role: "alert" });
  const submit = h("button", { type: "submit", class: "button primary" }, "Sign in");

  async function onSubmit(event) {
    event.preventDefault();
    const text = key.value.trim();
    if (!text) return say(problem, "An API key is required.");
    key.value = ""; // whatever comes of it, the key is not kept
    submit.disabled = true;
    say(problem, "");
    try {
      enter(await signIn(text));
    } catch (error) {
      say(problem, error.status === 401 ? "This key is not known here." : `${error.message.replace(/\.?$/, ".")}`);
      key.focus();
    } finally {
      submit.disabled = false;
    }
  }

  const element = h(
    "div",
    { class: "door" },
    h(
      "section",
      { class: "panel" },
      h("img", { src: "/console/icon.svg", alt: "", width: 40, height: 40 }),
      title,
      why && h("p", { id: "why", class: "why" }, why),
      h(
        "form",
        { novalidate: true, on: { submit: onSubmit } },
        h("label", { for: "key" }, "API key"),
        key,
        problem,
        submit,
      ),
      h(
        "p",
        { id: "key-hint", class: "quiet" },
        "The key is exchanged for a session of 12 hours in this browser, and not kept.",
      ),
      h(
        "details",
        { class: "quiet" },
        h("summary", {}, "Where do I get one?"),
        h("p", {}, "Where Switchboard runs, with its settings:"),
        h("pre", { class: "json", tabindex: 0 }, 'switchboard keys create --name "Your name" --scope admin'),
        h(
          "p",
          {},
          "It is shown once. A key with the scope ",
          h("code", {}, "app"),
          " opens everything but deliveries.",
        ),
      ),
    ),
  );
  return { element, title: "Sign in", heading: title };
}

/** The page while the service does not answer. */
export function closed({ message }) {
  const title = h("h1", { tabindex: -1 }, "Switchboard does not answer");
  const more = h("p", { class: "quiet" }, "It is asked again every few seconds.");
  const element = h("div", { class: "door" }, h("section", { class: "panel" }, title, h("p", {}, message), more));
  return { element, title: "Not available", heading: title };
}
