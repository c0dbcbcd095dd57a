// Asks the router once a second while somebody looks, and has the parts drawn. Nothing is kept but the key, in this tab.

import { byId, setAttribute, setText } from "./dom.js";
import { drawFleet } from "./fleet.js";
import { plural, span } from "./format.js";
import { drawRequests, setUpRequests } from "./requests.js";
import { drawSessions } from "./sessions.js";
import { drawTraffic } from "./traffic.js";

const INTERVAL_MS = 1000;
const TIMEOUT_MS = 5000;
const MOST_PAUSE_S = 15;
const KEY = "baton-key";

const poll = { timer: 0, failures: 0, retryAtMs: 0, serial: 0 };

async function ask() {
  clearTimeout(poll.timer);
  const serial = ++poll.serial;
  const key = sessionStorage.getItem(KEY);
  let outcome;
  try {
    const response = await fetch("status", {
      cache: "no-store",
      credentials: "omit",
      headers: key === null ? {} : { authorization: `Bearer ${key}` },
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    outcome = response.status === 200 ? { status: await response.json() } : { code: response.status };
  } catch (error) {
    outcome = { problem: error.name === "TimeoutError" ? "The router does not answer" : "The router cannot be reached" };
  }
  if (serial !== poll.serial) return;
  if (outcome.status) onStatus(outcome.status);
  else if (outcome.code === 401) onKeyNeeded(key !== null);
  else onProblem(outcome.problem ?? `The router answers with HTTP ${outcome.code}`);
}

function askAfter(milliseconds) {
  clearTimeout(poll.timer);
  if (!document.hidden) poll.timer = setTimeout(ask, milliseconds);
}

function onStatus(status) {
  poll.failures = 0;
  byId("banner").hidden = true;
  byId("sign-in").hidden = true;
  byId("board").hidden = false;
  byId("board").classList.remove("stale");
  byId("forget-key").hidden = sessionStorage.getItem(KEY) === null;
  tell(status.router.draining ? "draining" : "live", status.router.draining ? "Draining" : "Live");
  drawAbout(status);
  drawTraffic(byId("traffic"), status.traffic);
  drawFleet(status.fleet);
  drawRequests(status);
  drawSessions(status.sessions, status.at_unix_s, status.tenant === null);
  askAfter(INTERVAL_MS);
}

function onKeyNeeded(wasGiven) {
  sessionStorage.removeItem(KEY);
  tell("off", "Key needed");
  byId("banner").hidden = true;
  byId("board").hidden = true;
  byId("forget-key").hidden = true;
  setText(byId("key-problem"), wasGiven ? "The router does not know this key." : "");
  if (byId("sign-in").hidden) {
    byId("sign-in").hidden = false;
    byId("key").focus();
  }
}

function onProblem(problem) {
  poll.failures += 1;
  const pauseS = Math.min(MOST_PAUSE_S, 2 ** (poll.failures - 1));
  poll.retryAtMs = Date.now() + pauseS * 1000;
  tell("off", "Not connected");
  byId("board").classList.add("stale");
  byId("banner").hidden = false;
  countDown(problem, poll.serial);
  askAfter(pauseS * 1000);
}

function countDown(problem, serial) {
  if (serial !== poll.serial || byId("banner").hidden) return;
  const leftS = Math.max(0, Math.ceil((poll.retryAtMs - Date.now()) / 1000));
  setText(byId("banner-text"), `${problem}. ${leftS ? `Next try in ${plural(leftS, "second")}.` : "Trying."}`);
  setTimeout(() => countDown(problem, serial), 500);
}

function tell(state, text) {
  setAttribute(byId("connection"), "data-state", state);
  setText(byId("connection-text"), text);
}

function drawAbout({ router, tenant }) {
  const parts = [router.model ? router.model.name : "no model yet", `version ${router.version}`, `up ${span(router.uptime_s)}`];
  if (tenant !== null) parts.unshift(`tenant ${tenant}`);
  setText(byId("about"), parts.join(" · "));
  const title = router.model ? `${router.model.name} – Baton` : "Baton";
  if (document.title !== title) document.title = title;
}

function setUpTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const showState = () => setAttribute(byId("theme"), "aria-pressed", String(isDark()));
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("baton-theme", root.dataset.theme);
    showState();
  });
  system.addEventListener("change", showState);
  showState();
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  ask();
});
byId("forget-key").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  ask();
});
byId("retry").addEventListener("click", ask);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(poll.timer);
  else ask();
});
setUpTheme();
setUpRequests();
ask();
