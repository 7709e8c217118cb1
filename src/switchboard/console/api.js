/**
 * The HTTP API: requests, and what can go wrong with them.
 * @module
 */

const API = "/api/happyrobot";

const PATIENCE = 30_000; // milliseconds

/** What a request was answered, if it was not what was wanted. Its message is a sentence to show. */
export class ApiError extends Error {
  /**
   * @param {number} status 0: there was no answer.
   * @param {string} message
   * @param {Record<string, any>} [body]
   */
  constructor(status, message, body = {}) {
    super(message);
    this.status = status;
    this.body = body;
  }
}

/** Says `ended` when nobody is signed in any more, and `unanswered` when a request got no answer. */
export const access = new EventTarget();

/**
 * Sends a request and reads the answer.
 * @param {string} method
 * @param {string} path Below the API, or a whole one as the `Link` header has it.
 * @param {{ body?: any, headers?: Record<string, string>, signal?: AbortSignal, patience?: number }} [options]
 * @returns {Promise<{ body: any, headers: Headers }>}
 * @throws {ApiError} or AbortError, if the signal says so.
 */
export async function send(method, path, { body, headers = {}, signal, patience = PATIENCE } = {}) {
  const late = AbortSignal.timeout(patience);
  let answer, text;
  try {
    answer = await fetch(path.startsWith("/api/") ? path : API + path, {
      method,
      body: body === undefined ? undefined : JSON.stringify(body),
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      signal: signal ? AbortSignal.any([signal, late]) : late,
    });
    text = await answer.text();
  } catch (error) {
    if (signal?.aborted) throw error;
    access.dispatchEvent(new Event("unanswered"));
    throw new ApiError(0, late.aborted ? "There was no answer in time." : "The service cannot be reached.");
  }
  const read = parsed(text);
  if (answer.ok) return { body: read, headers: answer.headers };
  if (answer.status === 401 && !headers.Authorization) access.dispatchEvent(new Event("ended"));
  throw new ApiError(answer.status, read?.error ?? `The service answered ${answer.status}.`, read ?? {});
}

function parsed(text) {
  try {
    return text === "" ? null : JSON.parse(text);
  } catch {
    return null; // a proxy's page
  }
}

/** The body of the answer to a GET; parameters without a value are left out. */
export async function get(path, params = {}, signal) {
  return (await send("GET", path + query(params), { signal })).body;
}

/**
 * A page of a list, and where the next one is.
 * @returns {Promise<{ items: any[], next: string | null }>}
 */
export async function page(path, params = {}, signal) {
  const { body, headers } = await send("GET", path + query(params), { signal });
  return { items: body, next: /<([^>]+)>; rel="next"/.exec(headers.get("Link") ?? "")?.[1] ?? null };
}

/** The body of the answer to a POST. */
export async function post(path, body, options = {}) {
  return (await send("POST", path, { body, ...options })).body;
}

/** Parameters as they stand in an address; nothing without any. */
export function query(params) {
  const given = Object.entries(params).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

/** An id as it stands in a path. */
export const segment = encodeURIComponent;
