/**
 * What somebody means to start: a body and its `Idempotency-Key`, the same for as long as nobody has said what became of
 * it. It is kept where a reload of the page finds it, without the body: only its digest is needed to know it again.
 * @module
 */

const PLACE = "switchboard-intents";

/** @returns {Record<string, { key: string, unconfirmed: boolean }>} By digest. */
function kept() {
  return JSON.parse(sessionStorage.getItem(PLACE) ?? "{}");
}

/** Changes what is kept of a body; `null` forgets it. */
function keep(body, changes) {
  const all = kept();
  const of = digest(body);
  if (changes) all[of] = { ...all[of], ...changes };
  else delete all[of];
  sessionStorage.setItem(PLACE, JSON.stringify(all));
}

/** The key with which a body is sent, however often. */
export function keyOf(body) {
  const known = kept()[digest(body)];
  if (known) return known.key;
  const key = newKey();
  keep(body, { key, unconfirmed: false });
  return key;
}

/** Whether it may have placed a call, and must not be sent again. */
export const isUnconfirmed = (body) => kept()[digest(body)]?.unconfirmed ?? false;

export const doubt = (body) => keep(body, { unconfirmed: true });

/** It is known what became of it: the same body is another intent from now on. */
export const settle = (body) => keep(body, null);

/**
 * A hundred bits of a body, whatever the order of its names. Of our own: the browser has a digest only for pages
 * that came over an encrypted connection.
 */
function digest(body) {
  const text = JSON.stringify({ workflow_id: "default", ...body }, sorted);
  return [0, 1].map((seed) => hash(text, seed)).join("-");
}

function sorted(_, value) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return value;
  return Object.fromEntries(Object.entries(value).sort(([one], [other]) => (one < other ? -1 : 1)));
}

/** cyrb53, a hash of 53 bits. */
function hash(text, seed) {
  let [one, other] = [0xdeadbeef ^ seed, 0x41c6ce57 ^ seed];
  for (let at = 0; at < text.length; at++) {
    one = Math.imul(one ^ text.charCodeAt(at), 2654435761);
    other = Math.imul(other ^ text.charCodeAt(at), 1597334677);
  }
  one = Math.imul(one ^ (one >>> 16), 2246822507) ^ Math.imul(other ^ (other >>> 13), 3266489909);
  other = Math.imul(other ^ (other >>> 16), 2246822507) ^ Math.imul(one ^ (one >>> 13), 3266489909);
  return (4294967296 * (2097151 & other) + (one >>> 0)).toString(36);
}

/** Also where the page came over an unencrypted connection, which has no `randomUUID`. */
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `console-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
