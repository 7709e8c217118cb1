/**
 * The page: who is there, where they are, and what is around every view.
 * @module
 */

import { access, get } from "./api.js";
import { approvalsTitle, concernsApprovals, isAboutApproval, show as approvals } from "./approvals.js";
import { show as deliveries } from "./deliveries.js";
import { fill, h, say } from "./dom.js";
import { Live } from "./live.js";
import { announce, icon, notice, startClock } from "./parts.js";
import { every, paced, pause } from "./pacing.js";
import { address, here } from "./router.js";
import { show as run } from "./run.js";
import { show as runs } from "./runs.js";
import { current, signOut } from "./session.js";
import { closed, door } from "./signin.js";
import { forgetDraft, show as trigger } from "./trigger.js";

/**
 * What a view is given. Everything that it starts ends with `signal`, when somebody leaves it.
 * @typedef {object} Page
 * @property {AbortSignal} signal
 * @property {Live} live
 * @property {{ id: string, name: string | null, active: boolean }[]} workflows
 * @property {(id: string) => string} workflowName
 * @property {(scope: string) => boolean} may
 */

/**
 * @typedef {(place: import("./router.js").Place, page: Page) => {
 *   element: Element, title: string, heading: HTMLElement, changed?: (place: import("./router.js").Place) => void
 * }} View `changed` takes another place of the same view.
 */

/** Each with the scope that it needs. */
const VIEWS = {
  runs: { show: runs, needs: "read" },
  run: { show: run, needs: "read" },
  approvals: { show: approvals, needs: "read" },
  deliveries: { show: deliveries, needs: "operate" },
  trigger: { show: trigger, needs: "trigger" },
};

const MOST_COUNTED = 100;

const main = document.getElementById("main");
const bar = document.getElementById("bar");

/** @type {import("./session.js").Session | null} */
let session = null;
let workflows = [];
let view = null;
let place = null;
let leave = new AbortController();

/** The other pages of this browser, which have the same cookie. */
const others = new BroadcastChannel("switchboard");

const live = new Live(async () => {
  if ((await current()) === null) signedOut("Your session has ended.");
});

const may = (scope) => session?.scopes.includes(scope) ?? false;

const workflowName = (id) => workflows.find((workflow) => workflow.id === id)?.name ?? id;

/** Shows where somebody is. */
function arrive() {
  if (session === null) return;
  const to = here();
  if (!Object.hasOwn(VIEWS, to.view)) to.view = "runs";
  if (view?.changed && place?.view === to.view && place.id === to.id) {
    place = to;
    return view.changed(to);
  }
  place = to;
  const { show, needs } = VIEWS[to.view];
  put(may(needs) ? (page) => show(to, page) : () => forbidden());
  for (const link of bar.querySelectorAll("nav a")) {
    const isHere = link.dataset.view === to.view || (to.view === "run" && link.dataset.view === "runs");
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/** Puts a view in place of the one before, and takes a reader to its heading. */
function put(make) {
  const first = view === null;
  leave.abort();
  leave = new AbortController();
  view = make({ signal: leave.signal, live, workflows, workflowName, may });
  document.title = `${view.title} · Switchboard`;
  fill(main, view.element);
  if (first) return;
  scrollTo(0, 0);
  view.heading.focus({ preventScroll: true });
}

function forbidden() {
  const heading = h("h1", { tabindex: -1 }, "Not for you");
  return {
    element: h("div", { class: "view" }, heading, h("p", {}, "Your key does not allow this.")),
    title: "Not allowed",
    heading,
  };
}

async function enter(now) {
  session = now;
  try {
    await readWorkflows();
  } catch (error) {
    if (session !== now) return; // which has ended already
    notice(`The workflows could not be read. ${error.message}`, { bad: true });
  }
  place = null;
  fill(bar, top());
  live.open();
  arrive();
  countApprovals(true);
}

/** For those who may start one; others see ids in place of names. */
async function readWorkflows() {
  workflows = may("trigger") ? await get("/workflows") : [];
}

const LEFT = "You have signed out.";

/** Closes everything; somebody whose session has only ended finds what they have typed. */
function signedOut(why) {
  if (session === null) return;
  if (why === LEFT) forgetDraft();
  session = null;
  live.close();
  fill(bar);
  showDoor(why);
}

function showDoor(why = "") {
  put(() => door(why, arrived));
  announce(why);
  main.querySelector("input").focus();
}

function arrived(now) {
  others.postMessage("signed in");
  enter(now);
}

/** Asks who is there until it is known. */
async function begin() {
  for (;;) {
    try {
      const now = await current();
      return now ? enter(now) : showDoor();
    } catch (error) {
      if (view === null) put(() => closed(error));
      await pause(3000);
    }
  }
}

// What is around every view.

const badgeOfApprovals = h("span", { class: "count-badge number", hidden: true });
const connection = h(
  "p",
  { class: "connection", role: "status", data: { state: live.state } },
  h("span", { class: "dot" }),
  h("span", {}, live.state),
);

function top() {
  const links = [
    may("read") && ["runs", "Runs"],
    may("read") && ["approvals", "Approvals"],
    may("operate") && ["deliveries", "Deliveries"],
  ].filter(Boolean);
  return [
    h(
      "a",
      { class: "brand", href: address("runs"), "aria-label": "Switchboard" },
      h("img", { src: "/console/icon.svg", alt: "", width: 24, height: 24 }),
      h("span", {}, "Switchboard"),
    ),
    may("trigger") &&
      h(
        "a",
        {
          class: "button primary begin",
          href: address("trigger"),
          "aria-label": "Start a workflow",
          data: { view: "trigger" },
        },
        icon("plus"),
        h("span", {}, "Start a workflow"),
      ),
    h(
      "nav",
      { "aria-label": "Views" },
      links.map(([name, word]) =>
        h(
          "a",
          { href: address(name), data: { view: name } },
          icon(name),
          h("span", {}, word),
          name === "approvals" && badgeOfApprovals,
        ),
      ),
    ),
    h(
      "div",
      { class: "around" },
      connection,
      h(
        "div",
        { class: "tools" },
        h("a", { class: "button bare", href: "/docs", title: "The API", "aria-label": "The API" }, icon("book")),
        h(
          "button",
          {
            type: "button",
            class: "button bare",
            title: "Light or dark",
            "aria-label": "Light or dark",
            on: { click: changeTheme },
          },
          icon("theme"),
        ),
        !session.anonymous &&
          h(
            "button",
            {
              type: "button",
              class: "button bare",
              title: `Sign out${session.name ? ` (${session.name})` : ""}`,
              "aria-label": "Sign out",
              on: { click: leaveForGood },
            },
            icon("leave"),
          ),
      ),
    ),
  ];
}

async function leaveForGood() {
  try {
    await signOut();
    others.postMessage("signed out");
    signedOut(LEFT);
  } catch (error) {
    notice(error.message, { bad: true });
  }
}

function changeTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("switchboard-theme", root.dataset.theme);
}

const forever = new AbortController().signal;

const countApprovals = paced(forever, 5000, async () => {
  if (!may("read")) return;
  try {
    const { length } = await get("/approvals", { status: "pending", limit: MOST_COUNTED });
    const before = badgeOfApprovals.textContent;
    badgeOfApprovals.hidden = length === 0;
    say(badgeOfApprovals, length < MOST_COUNTED ? String(length) : `${MOST_COUNTED - 1}+`);
    badgeOfApprovals.title = approvalsTitle(length);
    if (before !== "" && Number.parseInt(before) < length) announce(approvalsTitle(length));
  } catch {
    // It is counted again with the next event; the view itself says what is wrong.
  }
});

live.addEventListener("happened", ({ detail }) => {
  // The end of a run withdraws what it has asked.
  if (isAboutApproval(detail) || (concernsApprovals(detail) && !badgeOfApprovals.hidden)) countApprovals();
});
live.addEventListener("opened", countApprovals);
live.addEventListener("state", () => {
  connection.dataset.state = live.state;
  say(connection.lastChild, live.state);
});
others.addEventListener("message", ({ data }) => (data === "signed out" ? signedOut(LEFT) : begin()));
access.addEventListener("unanswered", () => live.reopen());
access.addEventListener("ended", () => session !== null && signedOut("Your session has ended."));
addEventListener("hashchange", arrive);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is where somebody is
  main.focus();
});

startClock(forever);
every(60_000, () => readWorkflows().catch(() => {}), forever); // somebody may register one
begin();
