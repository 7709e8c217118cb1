/**
 * Who is signed in: the API key is exchanged for a cookie that no script can read, and forgotten.
 * @module
 */

import { ApiError, send } from "./api.js";

const HOURS = 12;

/**
 * @typedef {object} Session
 * @property {boolean} anonymous
 * @property {string[]} scopes `read`, `trigger`, `decide`, `operate`.
 * @property {string | null} expires_at
 * @property {string | null} name
 */

/**
 * @returns {Promise<Session | null>} null if nobody is.
 * @throws {ApiError} if that cannot be said.
 */
export async function current() {
  try {
    return (await send("GET", "/session")).body;
  } catch (error) {
    if (error instanceof ApiError && [401, 403].includes(error.status)) return null;
    throw error;
  }
}

/**
 * @param {string} key
 * @returns {Promise<Session>}
 */
export async function signIn(key) {
  const withKey = { headers: { Authorization: `Bearer ${key}` } };
  const { scopes } = (await send("GET", "/session", withKey)).body;
  if (!scopes.includes("read")) throw new ApiError(403, "This key opens nothing here: it may not see runs.");
  const wanted = { context_ids: "*", scopes, expires_in: HOURS * 3600 };
  const { token } = (await send("POST", "/tokens", { body: wanted, ...withKey })).body;
  await send("POST", "/session", { headers: { Authorization: `Bearer ${token}` } });
  const session = await current();
  if (session === null) throw new ApiError(0, "The browser has not kept the session: it must take cookies from here.");
  return session;
}

export async function signOut() {
  await send("DELETE", "/session");
}
