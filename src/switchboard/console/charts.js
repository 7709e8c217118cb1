/**
 * Two charts: how many runs there were by the hour, and how long they took. Drawn at the size at which they are shown.
 * @module
 */

import { fill, h, svg } from "./dom.js";
import { day, duration, minute, number, STATUSES } from "./format.js";

const LEFT = 48;
const TOP = 8;
const BOTTOM = 22;

let charts = 0;

/**
 * @typedef {object} Hour
 * @property {string} hour
 * @property {number} total
 * @property {Record<string, number>} by_status
 * @property {number | null} p50
 * @property {number | null} p95
 */

/** Runs by hour, or by more hours where there are many, stacked by status. */
export function runsChart() {
  return chart(
    "Runs started",
    Object.entries(STATUSES).map(([status, { word }]) => [status.toLowerCase(), word]),
    (hours) => {
      const bars = grouped(hours);
      const most = ceiling(Math.max(...bars.map((bar) => bar.total)), ROUND_NUMBERS);
      return {
        columns: bars.map((bar) => ({
          label: bar.label,
          reading: told(bar),
          cells: Object.keys(STATUSES).map((status) => number(bar.by_status[status] ?? 0)),
          moment: bar.moment,
        })),
        headings: Object.values(STATUSES).map(({ word }) => word),
        most,
        write: number,
        draw: (x, y, width) => bars.flatMap((bar, at) => stack(bar, x(at), y, width)),
        summary: counted(bars.reduce((sum, bar) => sum + bar.total, 0)),
      };
    },
  );
}

/** How long runs took: of those that completed, half took no longer than p50, nineteen of twenty no longer than p95. */
export function durationsChart() {
  return chart(
    "Duration",
    [
      ["p95", "p95"],
      ["p50", "p50"],
    ],
    (hours) => {
      const points = grouped(hours);
      const longest = Math.max(...points.map((point) => point.p95 ?? 0));
      const about = points.length < hours.length ? "about " : "";
      return {
        columns: points.map((point) => ({
          label: point.label,
          reading:
            point.p50 === null
              ? "no run completed"
              : `p50 ${about}${duration(point.p50)} · p95 ${about}${duration(point.p95)}`,
          cells: [duration(point.p50), duration(point.p95)],
          moment: point.moment,
        })),
        headings: ["p50", "p95"],
        most: ceiling(longest, ROUND_TIMES),
        write: rough,
        draw: (x, y, width) =>
          ["p95", "p50"].flatMap((of) =>
            line(
              points.map((point) => point[of]),
              of,
              (at) => x(at) + width / 2,
              y,
            ),
          ),
        summary: longest ? `p95 up to ${about}${duration(longest)}` : "no run completed",
      };
    },
  );
}

/**
 * A chart with its legend, a line that reads out what is pointed at, and the same as a table.
 * @param {(hours: Hour[]) => any} plan What is to be drawn.
 */
function chart(title, legend, plan) {
  const place = ++charts;
  const reading = h("p", { class: "reading", "aria-hidden": "true" });
  const drawing = h("div", { class: "drawing" });
  const rows = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${title}, as a table` });
  const keys = legend.map(([kind, word]) => h("li", { data: { kind } }, word));
  const element = h(
    "section",
    { class: "panel chart", "aria-labelledby": `chart-${place}` },
    h("header", {}, h("h2", { id: `chart-${place}` }, title), reading),
    drawing,
    h("footer", {}, h("ul", { class: "legend" }, keys), h("details", {}, h("summary", {}, "As a table"), rows)),
  );

  let planned = null;
  const draw = () => {
    const { clientWidth: width, clientHeight: height } = drawing;
    if (planned && width > 0)
      fill(
        drawing,
        plot(title, planned, width, height, (text) => fill(reading, text)),
      );
  };
  new ResizeObserver(draw).observe(drawing);
  const update = (hours) => {
    planned = plan(hours);
    fill(reading, planned.summary);
    fill(rows, asTable(title, planned));
    draw();
  };
  return { element, update };
}

function plot(title, { columns, most, write, draw, summary }, width, height, read) {
  const step = (width - LEFT) / columns.length;
  const x = (at) => LEFT + at * step;
  const y = (value) => height - BOTTOM - (value / most) * (height - BOTTOM - TOP);
  const pointed = svg("rect", {
    class: "pointed",
    y: TOP,
    width: step,
    height: height - TOP - BOTTOM,
    visibility: "hidden",
  });
  const point = (event) => {
    const at = Math.floor((event.offsetX - LEFT) / step);
    if (!columns[at]) return leave();
    pointed.setAttribute("x", x(at));
    pointed.setAttribute("visibility", "visible");
    read(`${columns[at].label} — ${columns[at].reading}`);
  };
  const leave = () => {
    pointed.setAttribute("visibility", "hidden");
    read(summary);
  };
  const lines = [0, 0.5, 1].map((part) => [
    svg("line", { class: "grid", x1: LEFT, x2: width, y1: y(most * part), y2: y(most * part) }),
    svg("text", { class: "tick", x: LEFT - 8, y: y(most * part) + 4, "text-anchor": "end" }, write(most * part)),
  ]);
  return svg(
    "svg",
    {
      width,
      height,
      role: "img",
      "aria-label": `${title}: ${summary}`,
      on: { pointermove: point, pointerleave: leave },
    },
    svg("title", {}, title),
    svg("desc", {}, `${summary}; the table below has the numbers.`),
    pointed,
    lines,
    draw(x, y, step),
    ticks(columns, x, step, width, height),
  );
}

/** Names under some of the columns, as many as there is room for. */
function ticks(columns, x, step, width, height) {
  const every = Math.max(1, Math.ceil(columns.length / Math.max(2, Math.floor((width - LEFT) / 84))));
  return columns.map((column, at) => {
    if (at % every !== 0 || x(at) + 40 > width) return null;
    const text =
      columns.at(-1).moment - columns[0].moment > 2 * 86_400_000 ? day(column.moment) : minute(column.moment);
    return svg(
      "text",
      {
        class: "tick",
        x: x(at) + (every === 1 ? step / 2 : 0),
        y: height - 5,
        "text-anchor": every === 1 ? "middle" : "start",
      },
      text,
    );
  });
}

function stack(bar, left, y, step) {
  const gap = Math.min(3, step / 4);
  let below = 0;
  return Object.keys(STATUSES).map((status) => {
    const count = bar.by_status[status] ?? 0;
    if (!count) return null;
    const top = y(below + count);
    // A hair between two parts, so that their border shows also where their colours look alike.
    const height = Math.max(1, y(below) - top - (below ? 1 : 0));
    below += count;
    return svg("rect", {
      data: { kind: status.toLowerCase() },
      class: "bar",
      x: left + gap / 2,
      y: top,
      width: Math.max(1, step - gap),
      height,
      rx: 1,
    });
  });
}

/** A line through what is known; a value between two gaps is a point, and large enough to be seen. */
function line(values, kind, x, y) {
  const parts = [];
  const points = [];
  let open = false;
  values.forEach((value, at) => {
    if (value === null) {
      open = false;
      return;
    }
    parts.push(`${open ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`);
    if (!open && (values[at + 1] ?? null) === null)
      points.push(svg("circle", { class: "point", data: { kind }, cx: x(at), cy: y(value), r: 3 }));
    open = true;
  });
  return [svg("path", { class: "line", data: { kind }, d: parts.join("") }), points];
}

function asTable(title, { columns, headings }) {
  return h(
    "table",
    { class: "rows" },
    h("caption", { class: "unseen" }, title),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["Time", ...headings].map((text) => h("th", { scope: "col" }, text)),
      ),
    ),
    h(
      "tbody",
      {},
      columns.map((column) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, column.label),
          column.cells.map((cell) => h("td", { class: "number" }, cell)),
        ),
      ),
    ),
  );
}

/**
 * Hours put together, so that a bar is wide enough to be seen: six in a week, the days of a month. Their p50 and p95
 * are the means of the hours', which comes near.
 */
function grouped(hours) {
  const size = hours.length <= 48 ? 1 : hours.length <= 14 * 24 ? 6 : 24;
  const groups = new Map();
  for (const hour of hours) {
    const moment = new Date(hour.hour);
    if (size > 1) moment.setHours(Math.floor(moment.getHours() / size) * size, 0, 0, 0);
    const group = groups.get(+moment) ?? {
      moment,
      label: name(moment, size),
      total: 0,
      by_status: {},
      p50: null,
      p95: null,
    };
    groups.set(+moment, group);
    const [before, more] = [group.by_status.COMPLETED ?? 0, hour.by_status.COMPLETED ?? 0];
    if (hour.p50 !== null) {
      for (const of of ["p50", "p95"]) group[of] = ((group[of] ?? 0) * before + hour[of] * more) / (before + more);
    }
    group.total += hour.total;
    for (const [status, count] of Object.entries(hour.by_status)) {
      group.by_status[status] = (group.by_status[status] ?? 0) + count;
    }
  }
  return [...groups.values()];
}

function name(moment, size) {
  const from = new Date(moment);
  if (size === 24) return day(from);
  return `${day(from)}, ${minute(from)}–${minute(new Date(+from + size * 3_600_000))}`;
}

const counted = (runs) => `${number(runs)} ${runs === 1 ? "run" : "runs"}`;

function told({ total, by_status }) {
  if (!total) return "no runs";
  const parts = Object.entries(STATUSES).filter(([status]) => by_status[status]);
  const words = parts.map(([status, { word }]) => `${number(by_status[status])} ${word.toLowerCase()}`);
  return `${counted(total)}: ${words.join(", ")}`;
}

/** Seconds on an axis. */
function rough(seconds) {
  if (seconds < 60) return `${number(seconds)} s`;
  return seconds < 3600 ? `${number(tenths(seconds / 60))} min` : `${number(tenths(seconds / 3600))} h`;
}

const tenths = (value) => Math.round(value * 10) / 10;

const ROUND_NUMBERS = [2, 4, 6, 8, 10, 12, 16, 20, 30, 40, 50, 60, 80, 100];
const ROUND_TIMES = [2, 4, 10, 20, 40, 60, 120, 240, 360, 480, 600, 1200, 1800, 3600, 7200, 14_400, 28_800, 86_400];

/** The first of these that is not less, or a hundred times one of them, so that its half can be written, too. */
function ceiling(value, round) {
  return round.find((each) => each >= value) ?? 100 * ceiling(value / 100, round);
}
