/** The page: wires the client, the player and the controls to what is seen and clicked. */

import { Client } from "./client.js";
import { Film, fit, Minimap } from "./draw.js";
import { ACTIONS, Controls, keyName } from "./input.js";
import { Player } from "./player.js";

const $ = (id) => document.getElementById(id);
const page = document.body;
const query = new URLSearchParams(location.search);
const MAX_SIDE = 1280; // of a start picture, so that a phone's photo is a small upload
const CAPS = {
  "move-caps": ["down", "forward", "up", "left", "back", "right"],
  "look-caps": [null, "lookUp", null, "turnLeft", "lookDown", "turnRight"],
};
const BUTTONS = { pause: "Pause", step: "Step", rewind: "Rewind", branch: "Branch", reset: "Restart", record: "Record" };
const PARTS = { queue: "#5a6579", diffuse: "#7fb2ff", decode: "#b79bff", copy: "#5ac7da", encode: "#5ccb98", rest: "#39414f" };
const VIEW_NAMES = { model: "Model", world: "True world", other: "Other model" };
const h264 = window.isSecureContext && "VideoDecoder" in window;
const address = (path) => `${path}?${new URLSearchParams({ token: query.get("token") ?? "", session: client.session ?? "" })}`;

let welcome = null;
let state = { paused: false, recording: false, chunk: 0, rewind: 0, role: "player", queue: 0 };
let link = { status: "connecting" };
let screens = []; // one { canvas, pen } per view
let newest = null; // frame on the screen
let fork = null; // chunk to which the last rewind went

const socket = new URL(`ws?${new URLSearchParams({ token: query.get("token") ?? "" })}`, location.href);
socket.protocol = socket.protocol.replace("http", "ws");
const client = new Client(socket.href, { codecs: codecs(query.get("codec") ?? localStorage.getItem("minwm.codec")) });
const controls = new Controls((axes, t) => client.hold(axes, t), (yaw, pitch, t) => client.turn(yaw, pitch, t));
const player = new Player(show, (reason) => toast(reason));
const map = new Minimap($("map"));
const film = new Film($("film"), (chunk) => rewind(state.chunk - chunk));
window.minwm = { client, stats: client.stats, player, controls };

function codecs(wanted) {
  return h264 && wanted === "h264" ? ["h264", "jpeg"] : ["jpeg"];
}

// -------------------------------------------------------------------------------------------------
// What the server says

client.addEventListener("status", ({ detail }) => {
  if (detail.status === "closed" && !detail.reason) return; // we hang up to call again
  link = detail;
  render();
});
client.addEventListener("role", () => controls.sync());
client.addEventListener("welcome", ({ detail }) => {
  welcome = detail;
  document.title = `${detail.title} · minwm`;
  $("title").textContent = detail.title;
  screens = detail.views.map(screen);
  $("views").replaceChildren(...screens.map(({ figure }) => figure));
  screens.at(-1).figure.append($("hud"));
  togglePanel(!page.classList.contains("no-panel"));
  player.start(detail);
  setUp({ ...state, ...detail });
});
client.addEventListener("state", ({ detail }) => setUp({ ...state, ...detail }));
client.addEventListener("error", ({ detail }) => detail.fatal || toast(detail.reason));
client.addEventListener("frame", ({ detail }) => player.push(detail));

function screen(name, index, views) {
  const figure = document.createElement("figure");
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: welcome.width, height: welcome.height });
  canvas.dataset.testid = index ? `canvas-${index}` : "canvas";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `What the camera sees: ${VIEW_NAMES[name] ?? name}`);
  figure.append(canvas);
  if (views.length > 1) {
    const caption = document.createElement("figcaption");
    caption.textContent = VIEW_NAMES[name] ?? name;
    figure.append(caption);
  }
  return { figure, canvas, pen: canvas.getContext("2d", { alpha: false }) };
}

function show(view, picture, frame) {
  const { canvas, pen } = screens[view];
  if (view === 0 && newest && !frame.flush && frame.chunk > newest.chunk) {
    film.add(newest.chunk, canvas, Math.ceil((0.5 * welcome.fps) / welcome.chunk)); // about two a second
  }
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (view > 0) return;
  newest = frame;
  client.shown(frame);
  map.add(frame);
  if (frame.flush) film.keep(0, frame.chunk, 0);
}

function setUp(next) {
  if (next.paused || state.paused) client.stats.forget();
  if (state.recording && !next.recording) toast("Recorded. Save or replay it from the panel.", "good");
  state = next;
  if (document.activeElement !== $("prompt")) $("prompt").value = state.prompt ?? "";
  if (document.activeElement !== $("seed")) $("seed").value = state.seed;
  if (state.speed) $("speed").value = state.speed;
  if (state.speed) player.pace(state.speed);
  if (state.chunk < fork) fork = null; // a new walk
  render();
}

// -------------------------------------------------------------------------------------------------
// What is seen

function render() {
  const { can = {}, chunk = 1, fps = 1 } = welcome ?? {};
  const watching = state.role === "spectator";
  const playing = link.status === "open" && !watching;
  const kind = link.status !== "open" ? { connecting: "connecting", lost: "lost", closed: "fatal" }[link.status]
    : watching ? "watching" : state.recording ? "recording" : state.paused ? "paused" : "live";
  const words = { connecting: "Connecting", lost: "Connection lost", fatal: "Stopped", recording: "Recording", paused: "Paused", live: "Live" };
  $("status").dataset.state = kind;
  $("status").textContent = watching && kind === "watching" ? `Watching · place ${state.queue} in line` : words[kind];
  page.dataset.state = kind;

  const message = {
    connecting: welcome ? "" : "Waking the world …",
    lost: `Connection lost. Trying again in ${Math.ceil(link.seconds)} s.`,
    fatal: link.reason,
  }[kind];
  $("message").hidden = !message;
  $("message").classList.toggle("busy", kind === "connecting" || kind === "lost");
  $("message-text").textContent = message ?? "";
  $("message-button").hidden = kind === "connecting";
  $("message-button").textContent = kind === "lost" ? "Try now" : "Try again";

  for (const control of document.querySelectorAll("#buttons button, #film button, #panel [name]")) control.disabled = !playing;
  const [pause, record] = [button("pause"), button("record")];
  pause.querySelector("use").setAttribute("href", state.paused ? "#i-resume" : "#i-pause");
  pause.querySelector("span").textContent = state.paused ? "Play" : "Pause";
  pause.setAttribute("aria-label", state.paused ? "Play" : "Pause");
  record.setAttribute("aria-pressed", state.recording);
  record.querySelector("span").textContent = state.recording ? "Stop" : "Record";
  button("rewind").disabled = !playing || !state.rewind;
  button("branch").disabled = !playing || fork === null || state.chunk <= fork;
  film.keep(state.chunk - state.rewind, state.chunk, chunk / fps);
  $("prompt").readOnly = !can.prompt;
  $("prompt-button").hidden = !can.prompt;
  $("image-label").hidden = !can.image;
}

/** Four times a second is as often as numbers can be read. */
function numbers() {
  const { stats } = client;
  const { queue, diffuse, decode, copy, encode } = stats.timings;
  const whole = (ms) => (Number.isFinite(ms) ? Math.round(ms) : "–");
  const made = queue + diffuse + decode + copy + encode; // the rest: waiting for a chunk to begin, network, pacing
  $("p50").textContent = whole(stats.p50);
  $("p95").textContent = whole(stats.p95);
  const rows = {
    FPS: [stats.fps.toFixed(1)], Chunk: [`${whole(diffuse + decode + copy)} ms`, "diffuse"],
    Decode: [`${decode.toFixed(1)} ms`, "decode"], Encode: [`${encode.toFixed(1)} ms`, "encode"],
    Queue: [`${queue.toFixed(1)} ms`, "queue"], Wait: [`${whole(Math.max(0, stats.p50 - made))} ms`, "rest"],
  };
  $("numbers").replaceChildren(...Object.entries(rows).map(([name, [value, part]]) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
    if (part) row.style.setProperty("--k", PARTS[part]);
    return row;
  }));
  const parts = { ...stats.timings, rest: Math.max(0, stats.p50 - made || 0) };
  $("bar").replaceChildren(...Object.entries(parts).map(([name, ms]) => {
    const part = document.createElement("i");
    part.style.cssText = `--k: ${PARTS[name]}; flex-grow: ${ms}`;
    return part;
  }));
  const latency = Number.isFinite(stats.p50) ? ` · ${whole(stats.p50)} ms` : "";
  $("hud").textContent = newest && !state.paused ? `${Math.round(stats.fps)} fps${latency}` : "";
}

function toast(text, mood = "") {
  $("toast").textContent = text;
  $("toast").className = mood;
  $("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => ($("toast").hidden = true), 6000);
}

function resize() {
  if (screens.length) fit($("views"), screens.map(({ canvas }) => canvas));
  map.draw();
}

function animate() {
  controls.poll();
  player.tick();
  requestAnimationFrame(animate);
}

// -------------------------------------------------------------------------------------------------
// What the visitor does

const COMMANDS = {
  pause: () => client.command(state.paused ? "resume" : "pause"),
  step: () => client.command("step"),
  rewind: () => rewind(1),
  branch: () => client.command("branch"),
  reset: () => client.command("reset"),
  record: () => client.command(state.recording ? "stop" : "record"),
  panel: () => togglePanel(),
};

function rewind(chunks) {
  if (chunks < 1) return;
  fork = state.chunk - chunks;
  client.command("rewind", { chunks });
}

function button(name) {
  return $("buttons").querySelector(`[data-command=${name}]`);
}

function togglePanel(open = page.classList.contains("no-panel")) {
  page.classList.toggle("no-panel", !open);
  $("panel-button").setAttribute("aria-expanded", open);
  (open ? $("panel") : screens[0]?.figure)?.prepend($("map")); // without the panel the map lies on the picture
  resize();
}

function buildControls() {
  for (const [group, names] of Object.entries(CAPS)) {
    $(group).replaceChildren(...names.map((name) => {
      if (!name) return document.createElement("span");
      const cap = document.createElement("button");
      cap.dataset.action = name;
      cap.textContent = keyName(controls.keys[name][0]) || "·";
      cap.title = ACTIONS[name].label;
      cap.setAttribute("aria-label", ACTIONS[name].label);
      controls.cap(cap, name);
      return cap;
    }));
  }
  for (const element of $("buttons").children) {
    const { command } = element.dataset;
    element.title = `${ACTIONS[command].label} (${keyName(controls.keys[command][0])})`;
  }
}

function buildButtons() {
  $("buttons").replaceChildren(...Object.entries(BUTTONS).map(([command, label]) => {
    const element = document.createElement("button");
    element.dataset.command = element.dataset.testid = command;
    element.innerHTML = `<svg aria-hidden="true"><use href="#i-${command}"/></svg><span>${label}</span>`;
    element.setAttribute("aria-label", label);
    element.onclick = COMMANDS[command];
    return element;
  }));
}

function buildBindings() {
  $("bindings").replaceChildren(...Object.entries(ACTIONS).map(([name, { label }]) => {
    const element = document.createElement("button");
    element.type = "button";
    element.append(label, Object.assign(document.createElement("kbd"), { textContent: controls.keys[name].map(keyName).join(" ") || "none" }));
    element.onclick = () => {
      for (const other of $("bindings").children) other.removeAttribute("aria-pressed");
      element.setAttribute("aria-pressed", true);
      element.onkeydown = (event) => {
        event.preventDefault();
        if (event.code !== "Escape") controls.bind(name, event.code);
        buildBindings();
        buildControls();
        [...$("bindings").children][Object.keys(ACTIONS).indexOf(name)].focus();
      };
    };
    return element;
  }));
}

async function upload(file) {
  try {
    const picture = await createImageBitmap(file);
    const scale = Math.min(1, MAX_SIDE / Math.max(picture.width, picture.height));
    const canvas = new OffscreenCanvas(Math.round(picture.width * scale), Math.round(picture.height * scale));
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    const body = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
    const answer = await fetch(address("image"), { method: "POST", body });
    if (!answer.ok) throw new Error((await answer.json()).error);
  } catch (error) {
    toast(`${file.name} cannot be the start picture: ${error.message}`);
  }
}

async function save(path, name) {
  const answer = await fetch(address(path));
  if (!answer.ok) return toast(await answer.text().then((text) => (text.startsWith("{") ? JSON.parse(text).error : text)));
  const anchor = Object.assign(document.createElement("a"), { href: URL.createObjectURL(await answer.blob()), download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
}

function listen() {
  controls.mouse($("views"));
  controls.stick($("move-stick"), 0, 2);
  controls.stick($("look-stick"), 3, 4);
  controls.addEventListener("command", ({ detail }) => (detail === "panel" || !button(detail).disabled) && COMMANDS[detail]());
  controls.addEventListener("held", ({ detail }) => {
    for (const cap of document.querySelectorAll("[data-action]")) cap.classList.toggle("on", detail.has(cap.dataset.action));
    if (!client.input.idle) page.classList.add("moved");
  });
  const touch = () => page.classList.add("touch");
  if (matchMedia("(pointer: coarse)").matches) touch();
  addEventListener("pointerdown", (event) => event.pointerType === "touch" && touch());
  // A button that was clicked must not take the next Space; one reached by Tab keeps the focus
  addEventListener("click", (event) => event.detail && event.target.closest("nav button, header button, .caps button")?.blur());
  $("views").addEventListener("pointerdown", () => page.classList.add("moved"));
  $("message-button").onclick = () => client.connect();
  $("panel-button").onclick = () => togglePanel();
  $("full").hidden = !document.fullscreenEnabled;
  $("full").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen());
  $("prompt-form").onsubmit = (event) => (event.preventDefault(), client.command("prompt", { text: $("prompt").value }), $("prompt").blur());
  $("prompt").onkeydown = (event) => event.key === "Enter" && !event.shiftKey && (event.preventDefault(), $("prompt-form").requestSubmit());
  $("seed-form").onsubmit = (event) => (event.preventDefault(), client.command("seed", { value: Number($("seed").value) }), $("seed").blur());
  $("dice").onclick = () => client.command("seed", { value: Math.floor(Math.random() * 10_000) });
  $("speed").onchange = () => (client.command("speed", { value: Number($("speed").value) }), $("speed").blur());
  $("image").onchange = () => (upload($("image").files[0]), ($("image").value = ""));
  $("replay").onclick = () => client.command("replay");
  $("save-video").onclick = () => save("recording", "minwm.mp4");
  $("save-clip").onclick = () => save("clip", "minwm-clip.zip");
  listenToDrops();
  listenToSettings();
}

function listenToDrops() {
  addEventListener("dragover", (event) => (event.preventDefault(), page.classList.toggle("drop", welcome?.can.image === true)));
  addEventListener("dragleave", (event) => event.relatedTarget || page.classList.remove("drop"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    page.classList.remove("drop");
    const [file] = event.dataTransfer.files;
    if (file && welcome?.can.image) upload(file);
  });
}

function listenToSettings() {
  $("settings-button").onclick = () => (controls.releaseAll(), buildBindings(), $("settings").showModal());
  $("restore").onclick = () => (controls.restoreKeys(), buildBindings(), buildControls());
  for (const [id, key] of [["sensitivity", "value"], ["invert", "checked"], ["sticky", "checked"]]) {
    $(id)[key] = controls[id];
    $(id).oninput = () => ((controls[id] = key === "value" ? Number($(id).value) : $(id).checked), controls.save());
  }
  $("codec-label").hidden = !h264;
  $("codec").checked = client.codecs[0] === "h264";
  $("codec").oninput = () => {
    localStorage.setItem("minwm.codec", $("codec").checked ? "h264" : "jpeg");
    client.codecs = codecs(localStorage.getItem("minwm.codec"));
    client.connect();
  };
}

buildButtons();
buildControls();
listen();
if (innerWidth <= 900 || innerHeight <= 520) togglePanel(false);
new ResizeObserver(resize).observe($("views"));
setInterval(numbers, 250);
render();
animate();
client.connect();
