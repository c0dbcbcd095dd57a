// The sessions of which this router served a turn lately.

import { byId, el, reconcile, setAttribute, setText } from "./dom.js";
import { ago, count, percent, short } from "./format.js";

const COLUMNS = ["Session", "Turns", "History tokens", "Prompt tokens cached", "Output tokens", "Last on", "Last turn"];

export function drawSessions(sessions, nowUnixS, showsTenants) {
  const { idle, generating, recent } = sessions;
  const now = recent.filter((session) => session.generating).length;
  const total = idle === null ? `${count(recent.length)} lately` : `${count(idle + generating)} kept`;
  setText(byId("sessions-summary"), recent.length || idle ? `${total}, ${count(generating === null ? now : Math.max(generating, now))} generating` : "");
  const body = byId("sessions-body");
  if (!recent.length) {
    showEmpty(body);
    return;
  }
  if (!body.querySelector("table")) body.replaceChildren(makeTable());
  reconcile(body.querySelector("tbody"), recent.slice(0, 12), {
    key: (session) => `${session.tenant}/${session.session_id}`,
    make: makeRow,
    update: (row, session) => updateRow(row, session, nowUnixS, showsTenants),
  });
}

function showEmpty(body) {
  if (body.querySelector(".empty")) return;
  body.replaceChildren(
    el("div", { class: "empty" },
      el("p", { class: "lead", text: "No session had a turn here yet." }),
      el("p", {}, "A session keeps a conversation, so that each turn sends only what is new. ", el("code", { text: "baton chat" }), " opens one."),
    ),
  );
}

function makeTable() {
  const heads = COLUMNS.map((name, index) => el("th", { scope: "col", class: [1, 2, 4, 6].includes(index) ? "number" : null, text: name }));
  return el("table", { class: "sessions" }, el("thead", {}, el("tr", {}, ...heads)), el("tbody"));
}

function makeRow() {
  const cell = (index, name, ...children) => el("td", { class: name, "data-label": COLUMNS[index] }, ...children);
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, el("span", { class: "pulse", "aria-hidden": "true" }), el("span", { class: "id" }), el("span", { class: "where" })),
    cell(1, "number turns"),
    cell(2, "number history"),
    cell(3, "cached", el("span", { class: "meter", "aria-hidden": "true" }, el("span")), el("span", { class: "share" })),
    cell(4, "number output"),
    cell(5, "worker id"),
    cell(6, "number when"),
  );
}

function updateRow(row, session, nowUnixS, showsTenants) {
  const part = (name) => row.querySelector(name);
  const share = session.prompt_tokens ? session.cached_tokens / session.prompt_tokens : 0;
  row.classList.toggle("generating", session.generating);
  setText(part("th .id"), short(session.session_id, 16));
  setAttribute(part("th .id"), "title", session.session_id);
  setText(part(".where"), showsTenants ? session.tenant : "");
  setText(part(".turns"), count(session.turns) + (session.failed_turns ? ` + ${count(session.failed_turns)} failed` : ""));
  setText(part(".history"), count(session.history_tokens));
  part(".meter span").style.width = `${share * 100}%`;
  setText(part(".share"), session.turns ? `${percent(share)} of ${count(session.prompt_tokens)}` : "–");
  setText(part(".output"), count(session.completion_tokens));
  setText(part(".worker"), session.decode_worker || "–");
  setText(part(".when"), session.generating ? "generating" : ago(nowUnixS - session.updated_unix_s));
}
