/**
 * The stream of events: one for the whole page, which comes back by itself and goes on where it stopped.
 * @module
 */

import { pause } from "./pacing.js";

const REST = 10_000; // milliseconds out of sight after which a page lets others have its connection: browsers have six
const PATIENCE = 10_000; // milliseconds without a stream after which nobody speaks of "reconnecting" any more

/** @typedef {"connecting" | "live" | "reconnecting" | "offline" | "signed out"} State */

/**
 * @typedef {object} RunEvent
 * @property {number} id Grows with time.
 * @property {string} run_id
 * @property {string} context_id
 * @property {string} workflow_id
 * @property {string} event_type
 * @property {string} status The run's, once this had happened.
 * @property {string} timestamp
 * @property {any} data
 */

/**
 * Dispatches `happened` (a `CustomEvent` with the `RunEvent`), `opened` whenever the stream is open, and `state`.
 * Whoever shows a list reads it again when the stream opens: what came before that, no stream has told them.
 */
export class Live extends EventTarget {
  /** @type {State} */
  state = "connecting";

  /** @type {EventSource | null} */
  #source = null;
  #lastId = "";
  #patience = 0;
  #resting = 0;
  #checkAccess;

  /** @param {() => Promise<void>} checkAccess Closes this if nobody is signed in; fails if that cannot be said. */
  constructor(checkAccess) {
    super();
    this.#checkAccess = checkAccess;
    addEventListener("offline", () => this.#source && this.#become("offline"));
    addEventListener("online", () => this.#source && !document.hidden && this.open());
    document.addEventListener("visibilitychange", () => {
      this.#restIfHidden();
      if (!document.hidden && this.#source?.readyState === EventSource.CLOSED) this.open();
    });
    // Out of the browser's cache of pages, whose connections it has closed.
    addEventListener("pageshow", (event) => event.persisted && this.#source && this.open());
  }

  open() {
    this.#source?.close();
    const source = new EventSource(`/api/events${this.#lastId && `?last_event_id=${this.#lastId}`}`);
    this.#source = source;
    this.#restIfHidden(); // a page may be opened out of sight, and no event says so
    if (this.state === "signed out") this.#become("connecting");
    source.onopen = () => {
      this.#become("live");
      this.dispatchEvent(new Event("opened"));
    };
    source.onmessage = ({ data, lastEventId }) => {
      this.#lastId = lastEventId;
      this.dispatchEvent(new CustomEvent("happened", { detail: JSON.parse(data) }));
    };
    // The token has ended. There may be another: somebody has signed in on another page.
    source.addEventListener("renew", ({ lastEventId }) => {
      this.#lastId = lastEventId;
      this.#again(source, 0);
    });
    source.onerror = () => {
      if (this.state !== "offline") this.#become("reconnecting");
      // Otherwise the browser comes back by itself, and says after which event.
      if (source.readyState === EventSource.CLOSED) this.#again(source, 1000 + 2000 * Math.random());
    };
  }

  /** A request got no answer: a stream may be open in name only, through a proxy that has stopped to pass it on. */
  reopen() {
    if (this.state !== "live" || document.hidden) return;
    this.#become("reconnecting");
    this.open();
  }

  /** Nobody is signed in: there is nothing to follow. */
  close() {
    this.#source?.close();
    this.#source = null;
    this.#lastId = "";
    this.#become("signed out");
  }

  async #again(source, milliseconds) {
    source.close();
    await pause(milliseconds);
    if (source !== this.#source || document.hidden) return; // it is opened when somebody looks
    try {
      await this.#checkAccess();
      if (source === this.#source) this.open();
    } catch {
      if (source === this.#source) this.#again(source, 1000 + 2000 * Math.random());
    }
  }

  #restIfHidden() {
    clearTimeout(this.#resting);
    if (!document.hidden) return;
    this.#resting = setTimeout(() => {
      this.#source?.close();
      if (this.#source) this.#become("connecting"); // as soon as somebody looks
    }, REST);
  }

  /** @param {State} state */
  #become(state) {
    if (state === this.state) return;
    this.state = state;
    clearTimeout(this.#patience);
    if (state === "reconnecting") this.#patience = setTimeout(() => this.#become("offline"), PATIENCE);
    this.dispatchEvent(new Event("state"));
  }
}
