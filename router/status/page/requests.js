// The requests, live and ended, as a Gantt chart on one clock; the present is at its right edge.

import { byId, el, reconcile, setAttribute, setText } from "./dom.js";
import { count, duration, percent, plural, short, span } from "./format.js";

const STAGES = [
  ["queue", "queue", "waiting for its turn and for workers"],
  ["reserve", "reserve", "decode makes room for the KV"],
  ["prefill", "prefill", "the prompt is computed"],
  ["handoff", "handoff", "the KV goes from prefill to decode"],
  ["decode", "decode", "tokens are generated"],
  ["failure", "attempt failed", "another one goes on after the last token"],
];
const ENDS = { finished: ["✓", "finished"], failed: ["✕", "failed"], cancelled: ["⊘", "cancelled"] };
const WINDOWS_S = [10, 30, 120, 600];
const MOST_ROWS = matchMedia("(max-width: 860px)").matches ? 14 : 24;

const view = { windowS: 30, status: null, shown: "" };

export function setUpRequests() {
  byId("stage-legend").append(
    ...STAGES.map(([stage, name, meaning]) => el("li", { title: meaning }, el("span", { class: `swatch stage-${stage}`, "aria-hidden": "true" }), name)),
  );
  const windows = byId("windows");
  windows.append(...WINDOWS_S.map((seconds) => el("button", { type: "button", role: "radio", "data-seconds": String(seconds), text: seconds < 60 ? `${seconds} s` : `${seconds / 60} min`, click: () => choose(seconds) })));
  windows.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const index = (WINDOWS_S.indexOf(view.windowS) + step + WINDOWS_S.length) % WINDOWS_S.length;
    choose(WINDOWS_S[index]);
    windows.children[index].focus();
  });
  choose(view.windowS);
  const body = byId("requests-body");
  body.addEventListener("pointerover", (event) => show(event.target.closest(".row")));
  body.addEventListener("pointerleave", () => show(document.activeElement.closest?.(".row")));
  body.addEventListener("focusin", (event) => show(event.target.closest(".row")));
  body.addEventListener("focusout", () => show(null));
  body.addEventListener("keydown", onKey);
  window.addEventListener("scroll", () => show(null), { passive: true });
}

function choose(seconds) {
  view.windowS = seconds;
  for (const button of byId("windows").children) {
    const chosen = button.dataset.seconds === String(seconds);
    setAttribute(button, "aria-checked", String(chosen));
    setAttribute(button, "tabindex", chosen ? "0" : "-1");
  }
  if (view.status !== null) drawRequests(view.status);
}

export function drawRequests(status) {
  view.status = status;
  const { live, ended, running, queued } = status.requests;
  const beginS = status.at_unix_s - view.windowS;
  const recent = ended.filter((request) => request.received_unix_s + request.age_s >= beginS);
  const rows = [...live].reverse().slice(0, MOST_ROWS);
  rows.push(...recent.slice(0, MOST_ROWS - rows.length));
  keepFocused(rows, [...live, ...recent]);
  setText(byId("requests-summary"), `${count(running)} running, ${count(queued)} queued`);
  const body = byId("requests-body");
  if (!rows.length) {
    showEmpty(body, ended, status.at_unix_s);
    return;
  }
  if (!body.querySelector(".gantt")) body.replaceChildren(makeChart());
  drawAxis(body.querySelector(".axis .track"));
  reconcile(body.querySelector(".rows"), rows, {
    key: keyOf,
    make: makeRow,
    update: (row, request) => updateRow(row, request, beginS, status.tenant === null),
  });
  const hidden = running + queued + recent.length - rows.length;
  setText(body.querySelector(".more"), hidden > 0 ? `and ${plural(hidden, "more request")}` : "");
  keepOneStop(body);
  refresh(rows);
}

// Nobody loses the request that they read, as long as it is known.
function keepFocused(rows, all) {
  const key = document.activeElement.closest?.(".row")?.dataset.key;
  if (!key || rows.some((request) => keyOf(request) === key)) return;
  const read = all.find((request) => keyOf(request) === key);
  if (read) rows[rows.length - 1] = read;
}

// As elements have it in their data, which is text.
const keyOf = (request) => String(request.serial);

function showEmpty(body, ended, nowS) {
  show(null);
  const lead = ended.length ? `Nothing ran in the last ${span(view.windowS)}.` : "No request has come yet.";
  const hint = ended.length
    ? [`The last one ended ${span(nowS - ended[0].received_unix_s - ended[0].age_s)} ago; a longer time shows it.`]
    : ["Ask with ", el("code", { text: "baton chat" }), " or ", el("code", { text: 'baton generate "Once upon a time"' }), ": each request shows here while it runs."];
  if (!body.querySelector(".empty")) body.replaceChildren(el("div", { class: "empty" }, el("p", { class: "lead" }), el("p", { class: "hint" })));
  setText(body.querySelector(".lead"), lead);
  if (body.querySelector(".hint").textContent !== hint.map((part) => part.textContent ?? part).join("")) body.querySelector(".hint").replaceChildren(...hint);
}

function makeChart() {
  return el(
    "div",
    { class: "gantt" },
    el("div", { class: "axis", "aria-hidden": "true" }, el("span"), el("div", { class: "track" }), el("span")),
    el("div", { class: "rows", role: "list", "aria-label": "Requests; arrow keys go from one to another" }),
    el("p", { class: "more" }),
  );
}

function drawAxis(track) {
  const seconds = String(view.windowS);
  if (track.dataset.seconds === seconds) return;
  track.dataset.seconds = seconds;
  const ticks = [1, 0.75, 0.5, 0.25, 0].map((share) => {
    const tick = el("span", { class: "tick", text: share ? `−${view.windowS * share < 60 ? `${view.windowS * share} s` : `${(view.windowS * share) / 60} min`}` : "now" });
    tick.style.left = `${(1 - share) * 100}%`;
    return tick;
  });
  track.replaceChildren(...ticks);
}

function makeRow() {
  return el(
    "div",
    { class: "row", role: "listitem", tabindex: "-1" },
    el("span", { class: "label" }, el("span", { class: "mark", "aria-hidden": "true" }), el("span", { class: "id" }), el("span", { class: "where" })),
    el("span", { class: "track", "aria-hidden": "true" }),
    el("span", { class: "tokens" }),
  );
}

function updateRow(row, request, beginS, showsTenants) {
  const part = (name) => row.querySelector(name);
  const live = request.state === "running" || request.state === "queued";
  setAttribute(row, "class", `row is-${request.state}`);
  setText(part(".mark"), live ? "" : ENDS[request.state][0]);
  setText(part(".id"), request.request_id ? short(request.request_id) : "not read yet");
  setText(part(".where"), showsTenants ? request.tenant : "");
  setText(part(".tokens"), tokens(request));
  setAttribute(row, "aria-label", inWords(request));
  row.request = request;
  reconcile(part(".track"), segments(request, beginS), { key: (segment) => segment.key, make: () => el("i"), update: updateBar });
}

function updateBar(bar, segment) {
  setAttribute(bar, "class", `stage-${segment.stage}${segment.open ? " open" : ""}`);
  bar.style.left = `${segment.left}%`;
  bar.style.width = `${segment.width}%`;
  bar.style.top = `${segment.top}%`;
  bar.style.height = `${segment.height}%`;
}

/** The bars of a request that fall into the time shown, in percent of the track. */
function segments(request, beginS) {
  const lanes = Math.min(4, request.choices);
  const bars = [];
  const add = (key, stage, beginsS, endsS, lane, of, open = false) => {
    const from = Math.max(0, request.received_unix_s + beginsS - beginS);
    const to = Math.min(view.windowS, request.received_unix_s + endsS - beginS);
    if (to < 0 || to < from) return;
    bars.push({ key, stage, open, left: (from / view.windowS) * 100, width: ((to - from) / view.windowS) * 100, top: (lane / of) * 100, height: 100 / of });
  };
  const live = request.state === "running" || request.state === "queued";
  add("queue", "queue", 0, request.placed_s ?? request.age_s, 0, 1, live && request.placed_s === null);
  const last = new Map();
  request.attempts.forEach((attempt, index) => {
    const lane = attempt.choice % lanes;
    const beganS = attempt.stages[0].start_s;
    if (last.has(attempt.choice)) add(`${index}.wait`, "queue", last.get(attempt.choice), beganS, lane, lanes);
    for (const { stage, start_s, end_s } of attempt.stages) add(`${index}.${stage}`, stage, start_s, end_s ?? request.age_s, lane, lanes, end_s === null);
    const endS = attempt.stages.at(-1).end_s;
    if (attempt.failure) add(`${index}.failure`, "failure", endS, endS, lane, lanes);
    last.set(attempt.choice, endS ?? request.age_s);
  });
  if (live && last.size && request.attempts.every((attempt) => attempt.failure)) add("wait", "queue", Math.max(...last.values()), request.age_s, 0, 1, true);
  return bars;
}

function tokens(request) {
  if (!request.max_tokens) return "–";
  const most = request.max_tokens * request.choices;
  return request.state === "running" || request.state === "queued" ? `${count(request.completion_tokens)} / ${count(most)}` : count(request.completion_tokens);
}

function inWords(request) {
  const state = request.state === "running" ? `running, ${request.waits_for}` : request.state;
  return `Request ${request.request_id || "not read yet"}, ${state}, ${plural(request.completion_tokens, "token")} after ${duration(request.age_s)}`;
}

// Keys: one stop for Tab, arrows from row to row.

function keepOneStop(body) {
  const rows = [...body.querySelectorAll(".row")];
  const stop = rows.find((row) => row === document.activeElement) ?? rows.find((row) => row.tabIndex === 0) ?? rows[0];
  for (const row of rows) setAttribute(row, "tabindex", row === stop ? "0" : "-1");
}

function onKey(event) {
  if (event.key === "Escape") show(null);
  const row = event.target.closest(".row");
  if (!row) return;
  const to = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling, Home: row.parentElement.firstElementChild, End: row.parentElement.lastElementChild }[event.key];
  if (!to) return;
  event.preventDefault();
  row.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

// Details of the row under the pointer, or with the focus.

function show(row) {
  const details = byId("details");
  if (!row?.request) {
    details.hidden = true;
    view.shown = "";
    byId("requests-body").querySelector("[aria-describedby]")?.removeAttribute("aria-describedby");
    return;
  }
  if (view.shown !== row.dataset.key) show(null);
  view.shown = row.dataset.key;
  row.setAttribute("aria-describedby", "details");
  details.replaceChildren(...describe(row.request));
  details.hidden = false;
  place(details, row.getBoundingClientRect());
}

function refresh(rows) {
  if (!view.shown) return;
  const row = [...byId("requests-body").querySelectorAll(".row")].find((each) => each.dataset.key === view.shown);
  show(rows.some((request) => keyOf(request) === view.shown) ? row : null);
}

function place(details, row) {
  const { offsetWidth, offsetHeight } = details;
  const room = document.documentElement.clientWidth - offsetWidth - 12;
  details.style.left = `${Math.max(12, Math.min(room, row.left + 190))}px`;
  const below = row.bottom + 6;
  const fits = below + offsetHeight < window.innerHeight - 8;
  details.style.top = `${fits ? below : Math.max(8, row.top - offsetHeight - 6)}px`;
}

function describe(request) {
  const rate = request.last_token_s > request.first_token_s ? (request.completion_tokens - 1) / (request.last_token_s - request.first_token_s) : null;
  const facts = [
    ["State", request.state === "running" ? `running: ${request.waits_for}` : request.state + (request.error ? `: ${request.error}` : "")],
    ["Age", duration(request.age_s)],
    ["Prompt", plural(request.prompt_tokens, "token") + (request.cached_tokens ? `, ${percent(request.cached_tokens / request.prompt_tokens)} cached` : "")],
    ["Output", plural(request.completion_tokens, "token") + (rate ? `, ${rate.toFixed(1)} /s` : "")],
    ["First token", duration(request.first_token_s)],
    request.tenant ? ["Tenant", request.tenant] : null,
    request.session_id ? ["Session", short(request.session_id, 20)] : null,
    request.priority ? ["Priority", String(request.priority)] : null,
  ].filter((fact) => fact !== null);
  return [
    el("p", { class: "id", text: request.request_id || "not read yet" }),
    el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })])),
    ...request.attempts.map((attempt, index) => describeAttempt(request, attempt, index)),
  ];
}

function describeAttempt(request, attempt, index) {
  const where = attempt.prefill_worker ? `${attempt.prefill_worker} → ${attempt.decode_worker}` : attempt.decode_worker;
  const title = request.choices > 1 ? `Completion ${attempt.choice + 1}` : `Attempt ${index + 1}`;
  const stages = attempt.stages.map(({ stage, start_s, end_s }) =>
    el("li", {}, el("span", { class: `swatch stage-${stage}`, "aria-hidden": "true" }), `${stage} ${duration((end_s ?? request.age_s) - start_s)}`),
  );
  return el(
    "div",
    { class: "attempt" },
    el("p", {}, el("strong", { text: title }), ` ${where}`),
    el("ul", { class: "legend" }, ...stages),
    attempt.failure ? el("p", { class: "problem", text: attempt.failure }) : null,
  );
}
