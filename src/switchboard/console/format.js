/**
 * How things are written.
 * @module
 */

/** Statuses in words and shapes, in the order in which they are stacked. Colour alone says nothing to everybody. */
export const STATUSES = {
  COMPLETED: { word: "Completed", icon: "done" },
  FAILED: { word: "Failed", icon: "failed" },
  CANCELED: { word: "Canceled", icon: "stopped" },
  RUNNING: { word: "Running", icon: "running" },
  PENDING: { word: "Pending", icon: "waiting" },
};

/** Whether a run with this status is over. */
export const isOver = (status) => ["COMPLETED", "FAILED", "CANCELED"].includes(status);

const WHOLE = new Intl.NumberFormat("en");
const EXACT = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "long" });
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const MINUTE = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

export const number = (value) => WHOLE.format(value);
export const exact = (moment) => EXACT.format(new Date(moment));
export const clock = (moment) => CLOCK.format(new Date(moment));
export const minute = (moment) => MINUTE.format(new Date(moment));
export const day = (moment) => DAY.format(new Date(moment));

/** How long ago, to about one part in twenty. */
export function ago(moment, now = Date.now()) {
  const seconds = Math.max(0, (now - new Date(moment)) / 1000);
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  if (seconds < 7 * 86_400) return `${Math.floor(seconds / 86_400)} d ago`;
  return day(moment);
}

/** Seconds as people say them. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
}

const two = (value) => String(value).padStart(2, "0");

/** A long id with its beginning and its end. */
export function middle(text, most = 18) {
  if (text.length <= most) return text;
  const half = Math.floor((most - 1) / 2);
  return `${text.slice(0, most - 1 - half)}…${text.slice(-half)}`;
}

const TELLING = ["message", "summary", "error", "reason", "detail", "text", "content", "title", "name", "status"];

/** What a value says, in a line: HappyRobot's authors write whatever they like. */
export function gist(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "object") return String(value).slice(0, 300);
  if (typeof value.metadata?.title === "string") return value.metadata.title.slice(0, 300); // what is to be approved
  for (const name of TELLING) if (typeof value[name] === "string" && value[name]) return value[name].slice(0, 300);
  const text = JSON.stringify(value);
  return text === "{}" || text === "[]" ? "" : text.slice(0, 300);
}

/** `generated_content` and `generatedContent` as a heading. */
export function heading(name) {
  const words = name
    .replace(/([a-z\d])([A-Z])/g, "$1 $2")
    .replace(/[_-]+/g, " ")
    .trim();
  return words ? words[0].toUpperCase() + words.slice(1) : name;
}
