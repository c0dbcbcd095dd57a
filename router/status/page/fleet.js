// The fleet: a row for each worker, prefill first, with its KV pool by state.

import { byId, el, reconcile, setAttribute, setText } from "./dom.js";
import { compact, count, duration, percent, plural, span } from "./format.js";

const KV = [
  ["used", "used", "held by sequences being computed"],
  ["in_flight", "in flight", "finished, waiting to be handed over"],
  ["reserved", "reserved", "held for KV that has not arrived"],
  ["cached", "cached", "reusable prefixes that nobody uses"],
  ["free", "free", "empty"],
];
const ROLES = { prefill: 0, decode: 1 };
const STATES = {
  ready: "takes requests",
  suspect: "failed a request a moment ago: it comes last",
  silent: "its heartbeat is late: it comes last",
  stalled: "its engine makes no progress",
  draining: "takes nothing new",
};
const COLUMNS = ["Worker", "State", "Running", "Waiting", "Queued tokens", "KV pool held", "Speed", "Member for"];

export function drawFleet(fleet) {
  const body = byId("fleet-body");
  byId("fleet").hidden = fleet === null;
  if (fleet === null) return;
  drawLegend();
  const roles = Object.keys(ROLES).map((role) => fleet.filter((worker) => worker.role === role).length);
  setText(byId("fleet-summary"), fleet.length ? `${roles[0]} prefill, ${roles[1]} decode` : "");
  if (!fleet.length) {
    showEmpty(body);
    return;
  }
  if (!body.querySelector("table")) body.replaceChildren(makeTable());
  const sorted = [...fleet].sort((a, b) => ROLES[a.role] - ROLES[b.role] || a.worker_id.localeCompare(b.worker_id, "en", { numeric: true }));
  reconcile(body.querySelector("tbody"), sorted, { key: (worker) => worker.worker_id, make: makeRow, update: updateRow });
}

function showEmpty(body) {
  if (body.querySelector(".empty")) return;
  body.replaceChildren(
    el("div", { class: "empty" },
      el("p", { class: "lead", text: "No worker has joined yet." }),
      el("p", {}, "Requests wait for one, and fail when none comes. ", el("code", { text: "baton serve" }), " brings its own; others are started with ", el("code", { text: "python -m decode_worker --routers HOST:PORT" }), "."),
    ),
  );
}

function drawLegend() {
  const legend = byId("kv-legend");
  if (legend.children.length) return;
  legend.append(...KV.map(([state, name, meaning]) => el("li", { title: meaning }, el("span", { class: `swatch kv-${state}`, "aria-hidden": "true" }), name)));
}

function makeTable() {
  const heads = COLUMNS.map((name, index) => el("th", { scope: "col", class: index > 1 && index !== 5 ? "number" : null, text: name }));
  return el("table", { class: "fleet" }, el("thead", {}, el("tr", {}, ...heads)), el("tbody"));
}

function makeRow(worker) {
  const cell = (index, name, ...children) => el("td", { class: name, "data-label": COLUMNS[index] }, ...children);
  const bar = el("div", { class: "kv", role: "img" }, ...KV.map(([state]) => el("span", { class: `kv-${state}` })));
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, el("span", { class: "role" }), el("span", { class: "id" }), el("span", { class: "where" })),
    cell(1, "state", el("span", { class: "badge" })),
    cell(2, "number running"),
    cell(3, "number waiting"),
    cell(4, "number queued"),
    cell(5, "pool", bar, el("span", { class: "share" })),
    cell(6, "number speed"),
    cell(7, "number member"),
  );
}

function updateRow(row, worker) {
  const part = (name) => row.querySelector(name);
  const { kv } = worker;
  setText(part(".role"), worker.role);
  setAttribute(part(".role"), "class", `role stage-${worker.role}`);
  setText(part(".id"), worker.worker_id);
  setText(part(".where"), `${worker.node} · ${worker.device} · ${worker.weights}`);
  setText(part(".badge"), worker.state);
  setAttribute(part(".badge"), "class", `badge is-${worker.state}`);
  setAttribute(part(".badge"), "title", STATES[worker.state]);
  setText(part(".running"), count(worker.running_requests));
  setText(part(".waiting"), count(worker.waiting_requests));
  setText(part(".queued"), count(worker.queued_prefill_tokens));
  for (const name of ["running", "waiting", "queued"]) part(`.${name}`).classList.toggle("zero", part(`.${name}`).textContent === "0");
  KV.forEach(([state], index) => {
    part(".kv").children[index].style.flexGrow = kv[state];
  });
  const told = KV.filter(([state]) => kv[state]).map(([state, name]) => `${count(kv[state])} ${name}`).join(", ");
  const text = `${plural(kv.total, "block")} of ${worker.block_size_tokens} tokens: ${told}`;
  setAttribute(part(".kv"), "aria-label", text);
  setAttribute(part(".kv"), "title", text);
  setText(part(".share"), percent((kv.used + kv.reserved + kv.in_flight) / Math.max(1, kv.total)));
  setText(part(".speed"), speed(worker));
  setText(part(".member"), span(worker.member_s));
}

function speed(worker) {
  if (worker.role === "prefill") return worker.prefill_tokens_per_s ? `${compact(worker.prefill_tokens_per_s)} tok/s` : "–";
  return worker.decode_step_s ? `${duration(worker.decode_step_s)} step` : "–";
}
