// The tiles at the top: a number, and how it went in the last two minutes.

import { el, setAttribute, setText, svg } from "./dom.js";
import { bytes, compact, duration } from "./format.js";

const WIDTH = 240;
const HEIGHT = 44;
// Seconds without a value over which a line goes on.
const BRIDGED = 6;

const TILES = [
  {
    title: "Time to first token",
    colour: "prefill",
    value: (t) => duration(t.ttft.p50_s),
    note: (t) => (t.ttft.count ? `p50 · p99 ${duration(t.ttft.p99_s)}` : "no first token yet"),
    lines: (t) => [t.ttft.p99_series_s, t.ttft.p50_series_s],
    unit: duration,
  },
  {
    title: "Inter-token latency",
    colour: "decode",
    value: (t) => duration(t.itl.p50_s),
    note: (t) => (t.itl.count ? `p50 · p99 ${duration(t.itl.p99_s)}` : "no tokens yet"),
    lines: (t) => [t.itl.p99_series_s, t.itl.p50_series_s],
    unit: duration,
  },
  {
    title: "Output tokens",
    colour: "decode",
    value: (t) => `${compact(t.completion_tokens.per_s)} /s`,
    note: (t) => `${compact(t.completion_tokens.mean_per_s)} /s over ${Math.round((t.window_s + 1) / 60)} min`,
    area: (t) => t.completion_tokens.series_per_s,
    unit: (value) => `${compact(value)} /s`,
  },
  {
    title: "KV handoff",
    colour: "handoff",
    value: (t) => `${bytes(t.handoff_bytes.per_s)}/s`,
    note: (t) => `${bytes(t.handoff_bytes.mean_per_s)}/s over ${Math.round((t.window_s + 1) / 60)} min`,
    area: (t) => t.handoff_bytes.series_per_s,
    unit: (value) => `${bytes(value)}/s`,
  },
];

export function drawTraffic(parent, traffic) {
  if (!parent.children.length) parent.append(...TILES.map(makeTile));
  TILES.forEach((tile, index) => updateTile(parent.children[index], tile, traffic));
}

function makeTile(tile) {
  const chart = svg("svg", {
    class: "spark",
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    role: "img",
  });
  chart.append(svg("path", { class: "second" }), svg("path", { class: "first" }));
  return el(
    "article",
    { class: `card tile stage-${tile.colour}` },
    el("h2", { text: tile.title }),
    el("p", { class: "value" }),
    el("p", { class: "note" }),
    chart,
    el("p", { class: "top-of-scale", "aria-hidden": "true" }),
  );
}

function updateTile(element, tile, traffic) {
  setText(element.querySelector(".value"), tile.value(traffic));
  setText(element.querySelector(".note"), tile.note(traffic));
  const [second, first] = tile.area ? [tile.area(traffic), tile.area(traffic)] : tile.lines(traffic);
  const most = Math.max(0, ...second, ...first);
  const chart = element.querySelector("svg");
  chart.classList.toggle("filled", Boolean(tile.area));
  setAttribute(chart.children[0], "d", most ? (tile.area ? area : line)(second, most) : "");
  setAttribute(chart.children[1], "d", most ? line(first, most) : `M0 ${HEIGHT - 1}H${WIDTH}`);
  chart.classList.toggle("empty", !most);
  setAttribute(chart, "aria-label", `${tile.title}, the last two minutes, at most ${tile.unit(most)}`);
  setText(element.querySelector(".top-of-scale"), most ? tile.unit(most) : "");
}

const across = (index, series) => ((index / (series.length - 1)) * WIDTH).toFixed(1);
const up = (value, most) => (HEIGHT - 2 - (value / most) * (HEIGHT - 4)).toFixed(1);

function line(series, most) {
  let path = "";
  let last = -Infinity;
  series.forEach((value, index) => {
    if (value === null) return;
    const point = `${across(index, series)} ${up(value, most)}`;
    // A point on its own is a dot.
    path += index - last > BRIDGED ? `M${point}h0.01` : `L${point}`;
    last = index;
  });
  return path;
}

function area(series, most) {
  const points = series.map((value, index) => `L${across(index, series)} ${up(value, most)}`);
  return `M0 ${HEIGHT}${points.join("")}L${WIDTH} ${HEIGHT}Z`;
}
