// Sessions, live. Everything that comes from the service is put on the page as text, never as markup.
"use strict";

const LIST_EVERY_MS = 2000;
const POINTS_MAX = 600;
const watched = new Map(); // session -> {events, points, steps}
const element = (id) => document.getElementById(id);
let token = sessionStorage.getItem("token");

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

async function ask(path) {
  return fetch(path, { headers: { authorization: `Bearer ${token}` } });
}

// EventSource cannot send a token, so the stream is read by hand; after a break it goes on where it was.
async function follow(id, entry) {
  while (watched.get(id) === entry && token) {
    try {
      const answer = await ask(`v1/sessions/${id}/events?from=${entry.position}`);
      if (!answer.ok) return;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const blocks = (rest + value).split("\n\n");
        rest = blocks.pop();
        blocks.forEach((block) => hear(entry, block));
        draw(entry);
      }
    } catch (lost) { /* tried again below */ }
    await new Promise((wait) => setTimeout(wait, LIST_EVERY_MS));
  }
}

function hear(entry, block) {
  for (const line of block.split("\n")) {
    if (line.startsWith("id: ")) entry.position = Number(line.slice(4));
    if (!line.startsWith("data: ")) continue;
    const event = JSON.parse(line.slice(6));
    if (event.event === "progress") {
      // As the target says them.
      for (const name of ["bytes", "total_bytes", "megabytes_per_second", "eta_seconds"]) event[name] = Number(event[name]) || 0;
      entry.points.push(event.megabytes_per_second);
      if (entry.points.length > POINTS_MAX) entry.points.shift();
      entry.figures = event;
    }
    if (event.event === "step") {
      if (event.seconds !== undefined) event.seconds = Number(event.seconds) || 0;
      entry.steps.set(event.step, event);
      entry.figures = null;
    }
  }
}

function draw(entry) {
  const { record } = entry;
  if (!record) return;
  const node = entry.node;
  node.dataset.state = record.state;
  node.replaceChildren();
  const head = make("div", "head");
  head.append(make("h2", "", `${record.cluster} → ${record.target}:${record.data}`));
  head.append(make("span", `badge ${record.state}`, record.state.replace("_", " ")));
  node.append(head);
  const changed = new Date(record.updated_at).toLocaleString();
  node.append(make("div", "where", `${record.session} · ordered by ${record.ordered_by} · ${changed}`));
  if (record.message) node.append(make("div", "message", record.message));
  const steps = make("ol");
  for (const step of entry.steps.values()) {
    const seconds = step.seconds === undefined ? "" : ` ${step.seconds.toFixed(1)} s`;
    steps.append(make("li", step.state, `${step.step}${seconds}`));
  }
  if (entry.steps.size > 0) node.append(steps);
  const figures = entry.figures;
  if (figures && record.state === "running") {
    const bar = make("progress");
    if (figures.total_bytes) { bar.max = figures.total_bytes; bar.value = figures.bytes; }
    node.append(bar);
    const left = figures.eta_seconds ? `, ${Math.ceil(figures.eta_seconds)} s left` : "";
    const slow = figures.bottleneck ? `, bottleneck: ${figures.bottleneck}` : "";
    const total = figures.total_bytes ? ` of ${bytes(figures.total_bytes)}` : "";
    const rate = `${figures.megabytes_per_second.toFixed(0)} MB/s`;
    node.append(make("div", "figures", `${figures.phase}: ${bytes(figures.bytes)}${total}, ${rate}${left}${slow}`));
  }
  if (entry.points.length > 1) node.append(plot(entry.points));
}

function plot(points) {
  const figure = make("figure");
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  const highest = Math.max(...points, 1);
  picture.setAttribute("viewBox", "0 0 100 40");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("role", "img");
  const line = document.createElementNS(space, "polyline");
  const place = (point, at) => `${(100 * at) / (points.length - 1)},${39 - (38 * point) / highest}`;
  line.setAttribute("points", points.map(place).join(" "));
  picture.append(line);
  figure.append(picture, make("figcaption", "", `throughput, a point a second; at most ${highest.toFixed(0)} MB/s`));
  return figure;
}

async function list() {
  if (!token) return login("");
  try {
    const answer = await ask("v1/sessions");
    if (answer.status === 401) return login("The mount server does not know this token.");
    if (!answer.ok) throw new Error(answer.status);
    show((await answer.json()).sessions);
    element("state").textContent = "live";
  } catch (lost) {
    element("state").textContent = "connection lost, trying again";
  }
  setTimeout(list, LIST_EVERY_MS);
}

function show(sessions) {
  element("login").hidden = true;
  element("empty").hidden = sessions.length > 0;
  const known = new Set(sessions.map((record) => record.session));
  for (const [id, entry] of watched) {
    if (!known.has(id)) { entry.node.remove(); watched.delete(id); }
  }
  for (const record of sessions) {
    let entry = watched.get(record.session);
    if (!entry) {
      entry = { node: make("article"), points: [], steps: new Map(), position: 0 };
      entry.node.id = record.session;
      watched.set(record.session, entry);
      element("sessions").prepend(entry.node);
      follow(record.session, entry);
    }
    entry.record = record;
    draw(entry);
  }
}

function login(refusal) {
  token = null;
  sessionStorage.removeItem("token");
  element("state").textContent = "not connected";
  element("refusal").textContent = refusal;
  element("login").hidden = false;
}

element("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = element("token").value.trim();
  element("token").value = "";
  sessionStorage.setItem("token", token);
  list();
});
list();
