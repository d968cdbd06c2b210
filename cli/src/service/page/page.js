// Sessions, live. Everything that comes from the service is put on the page as text, never as markup.
//
// A round each second: the list, then what was said since in each session that has more to say. No request stays open: a
// browser has six connections to a host, and there may be more sessions.
"use strict";

const EVERY_MS = 1000;
const ANSWER_MS_MAX = 30000;
const POINTS_MAX = 600;
const STATES = { at_target: "at its target", waiting: "waiting for retry" };
const ACTIVE = ["connecting", "running", "retrying"];
const watched = new Map(); // session -> what is known of it, and its place on the page
const element = (id) => document.getElementById(id);
let token = sessionStorage.getItem("token");
let watch = 0; // counts them: a new token ends the watch of the one before
let lostAt = null;

class Refused extends Error {
  constructor(status) { super(`the mount server answers ${status}`); this.status = status; }
}

function make(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${unit === 0 ? count : count.toFixed(1)} ${units[unit]}`;
}

function duration(seconds) {
  seconds = Math.ceil(seconds);
  if (seconds < 120) return `${seconds} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const rate = (megabytes) => `${megabytes.toFixed(megabytes < 10 ? 1 : 0)} MB/s`;

async function ask(path) {
  const headers = { authorization: `Bearer ${token}` };
  const answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS_MAX) });
  if (!answer.ok) throw new Refused(answer.status);
  return answer;
}

async function begin() {
  if (!token) return login("");
  watch += 1;
  const mine = watch;
  while (mine === watch) {
    try {
      await round(mine);
      if (mine === watch) connected();
    } catch (cause) {
      if (mine !== watch) return;
      if (cause.status === 401) return login("The mount server does not know this token.");
      disconnected(cause);
    }
    await new Promise((wait) => setTimeout(wait, EVERY_MS));
  }
}

async function round(mine) {
  const { sessions } = await (await ask("v1/sessions")).json();
  if (mine !== watch) return;
  show(sessions);
  const isActive = (entry) => ACTIVE.includes(entry.record.state);
  const entries = [...watched.values()].filter((entry) => isActive(entry) || entry.heard !== entry.record.updated_at);
  for (const entry of entries.sort((one, other) => isActive(other) - isActive(one))) {
    try {
      await listen(entry);
    } catch (cause) {
      // Of this session alone: asked again in the next round.
      if (!(cause instanceof Refused) || cause.status === 401) throw cause;
    }
    if (mine !== watch) return;
    draw(entry);
  }
}

function connected() {
  lostAt = null;
  document.body.classList.remove("lost");
  say("state", "live");
}

function disconnected(cause) {
  lostAt ??= new Date();
  document.body.classList.add("lost");
  const why = cause instanceof Refused ? cause.message : "the mount server does not answer";
  say("state", `disconnected since ${lostAt.toLocaleTimeString()}: ${why}; trying again`);
}

// Only what is new: a screen reader says it each time.
function say(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text;
}

async function listen(entry) {
  const { session, updated_at } = entry.record;
  const path = `v1/sessions/${encodeURIComponent(session)}/events?follow=false&from=${entry.position}`;
  const said = await (await ask(path)).text();
  // What follows the last empty line was cut off.
  said.split("\n\n").slice(0, -1).forEach((block) => hear(entry, block));
  entry.heard = updated_at;
}

function hear(entry, block) {
  let event;
  for (const line of block.split("\n")) {
    if (line.startsWith("id: ")) entry.position = Number(line.slice(4)) || entry.position;
    if (!line.startsWith("data: ")) continue;
    try { event = JSON.parse(line.slice(6)); } catch (bad) { continue; }
  }
  if (event?.event === "progress") {
    entry.figures = event = figuresOf(event);
    // Each phase counts its seconds from 0.
    if (event.seconds < entry.seconds) entry.before += entry.seconds;
    entry.seconds = event.seconds;
    entry.points.push({ at: entry.before + event.seconds, rate: event.megabytes_per_second });
    if (entry.points.length > POINTS_MAX) entry.points.shift();
  }
  if (event?.event === "step") {
    entry.steps.set(event.step, event);
    entry.figures = null;
  }
}

// As the target says them: it may say anything.
function figuresOf(said) {
  const figures = { ...said };
  for (const name of ["bytes", "total_bytes", "megabytes_per_second", "eta_seconds", "seconds"]) {
    figures[name] = Math.max(0, Number(said[name]) || 0);
  }
  return figures;
}

// One that cannot be drawn does not keep the others from it.
function draw(entry) {
  try {
    const parts = partsOf(entry);
    entry.node.dataset.state = entry.record.state;
    entry.node.replaceChildren(...parts);
  } catch (cause) {
    const session = String(entry.record.session);
    entry.node.dataset.state = "unknown";
    entry.node.replaceChildren(make("h2", "", session), make("div", "message", `cannot be shown: ${cause.message}`));
  }
}

function partsOf(entry) {
  const { record } = entry;
  const state = STATES[record.state] ?? record.state.toString();
  const head = make("div", "head");
  head.append(make("h2", "", `${record.cluster} → ${record.target}:${record.data}`));
  head.append(make("span", `badge ${record.state}`, state));
  const time = (text) => new Date(text).toLocaleString();
  const when = `ordered by ${record.ordered_by}, ${time(record.created_at)} · last change ${time(record.updated_at)}`;
  const parts = [head, make("div", "where", `${record.session} · ${when}`)];
  if (record.message) parts.push(make("div", "message", record.message));
  if (entry.steps.size > 0) parts.push(stepsOf(entry));
  if (entry.figures && record.state === "running") parts.push(...progressOf(entry.figures));
  if (entry.points.length > 1) parts.push(plot(entry.points));
  if (entry.state && entry.state !== record.state) say("news", `${record.session}: ${state}`);
  entry.state = record.state;
  return parts;
}

function stepsOf(entry) {
  const list = make("ol");
  list.setAttribute("aria-label", "Steps");
  for (const step of entry.steps.values()) {
    const seconds = step.seconds === undefined ? "" : ` ${(Number(step.seconds) || 0).toFixed(1)} s`;
    list.append(make("li", step.state, `${step.step}${seconds}`));
  }
  return list;
}

function progressOf(figures) {
  const bar = make("progress");
  bar.setAttribute("aria-label", String(figures.phase));
  if (figures.total_bytes) { bar.max = figures.total_bytes; bar.value = figures.bytes; }
  const total = figures.total_bytes ? ` of ${bytes(figures.total_bytes)}` : "";
  const left = figures.eta_seconds ? `, ${duration(figures.eta_seconds)} left` : "";
  const slow = figures.bottleneck ? `, bottleneck: ${figures.bottleneck}` : "";
  const now = rate(figures.megabytes_per_second);
  return [bar, make("div", "figures", `${figures.phase}: ${bytes(figures.bytes)}${total}, ${now}${left}${slow}`)];
}

function plot(points) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  const highest = Math.max(...points.map((point) => point.rate));
  const first = points[0].at;
  const span = points[points.length - 1].at - first;
  picture.setAttribute("viewBox", "0 0 100 40");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("role", "img");
  const line = document.createElementNS(space, "polyline");
  const place = ({ at, rate }) => `${(100 * (at - first)) / (span || 1)},${39 - (38 * rate) / (highest || 1)}`;
  line.setAttribute("points", points.map(place).join(" "));
  picture.append(line);
  const text = `Throughput over ${duration(span)}, from 0 to ${rate(highest)}`;
  picture.setAttribute("aria-label", text);
  const figure = make("figure");
  figure.append(picture, make("figcaption", "", text));
  return figure;
}

function show(sessions) {
  element("login").hidden = true;
  element("empty").hidden = sessions.length > 0;
  const known = new Set(sessions.map((record) => record?.session));
  for (const [id, entry] of watched) {
    if (!known.has(id)) { entry.node.remove(); watched.delete(id); }
  }
  for (const record of sessions) {
    if (!record) continue;
    let entry = watched.get(record.session);
    if (!entry) {
      entry = { node: make("article"), points: [], steps: new Map(), position: 0, seconds: 0, before: 0 };
      watched.set(record.session, entry);
      element("sessions").prepend(entry.node);
    }
    const changed = JSON.stringify(record) !== JSON.stringify(entry.record);
    entry.record = record;
    if (changed) draw(entry);
  }
}

function login(refusal) {
  token = null;
  watch += 1;
  sessionStorage.removeItem("token");
  document.body.classList.remove("lost");
  say("state", "not connected");
  say("refusal", refusal);
  element("login").hidden = false;
  element("token").focus();
}

element("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = element("token").value.trim();
  element("token").value = "";
  say("refusal", "");
  sessionStorage.setItem("token", token);
  begin();
});
begin();
