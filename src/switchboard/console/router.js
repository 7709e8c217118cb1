/**
 * Where somebody is: what stands behind the `#`, which the browser keeps to itself. No id reaches a server's log so.
 * @module
 */

import { query } from "./api.js";

/**
 * @typedef {object} Place
 * @property {string} view
 * @property {string | null} id
 * @property {Record<string, string>} params
 */

/** @returns {Place} */
export function here() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [view, id] = path.split("/");
  return { view: view || "runs", id: id ? decoded(id) : null, params: Object.fromEntries(new URLSearchParams(search)) };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** The address of a place, for links. */
export function address(view, id = null, params = {}) {
  return `#/${view}${id === null ? "" : `/${encodeURIComponent(id)}`}${query(params)}`;
}

export function go(view, id = null, params = {}) {
  const to = address(view, id, params);
  if (to === location.hash) return;
  history.pushState(null, "", to);
  dispatchEvent(new HashChangeEvent("hashchange"));
}
