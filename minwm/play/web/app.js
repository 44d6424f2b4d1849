/** The page: connects client, playback and controls with the elements of index.html. */

import { Client } from "./client.js";
import { Filmstrip, fitCanvases, make, Minimap } from "./draw.js";
import { ACTIONS, Controls, keyName, layout, storage } from "./input.js";
import { Playback } from "./playback.js";

const $ = (id) => document.getElementById(id);
const page = document.body;
const query = new URLSearchParams(location.search);
const MAX_SIDE = 1280; // pixels of an uploaded start image
const KEYCAPS = {
  "move-caps": ["down", "forward", "up", "left", "back", "right"],
  "look-caps": [null, "lookUp", null, "turnLeft", "lookDown", "turnRight"],
};
const BUTTONS = {
  pause: "Pause", step: "Step", rewind: "Rewind", branch: "Branch", reset: "Restart", record: "Record",
};
const LATENCY_PARTS = {
  queue: "#5a6579", diffuse: "#7fb2ff", decode: "#b79bff", copy: "#5ac7da", encode: "#5ccb98", rest: "#39414f",
};
const STATES = {
  connecting: "Connecting", lost: "Connection lost", fatal: "Stopped",
  paused: "Paused", recording: "Recording", live: "Live",
};
const VIEW_NAMES = { model: "Model", world: "True world", other: "Other model" };
const h264 = window.isSecureContext && "VideoDecoder" in window;
const address = (path, values) => `${path}?${new URLSearchParams({ token: query.get("token") ?? "", ...values })}`;

const hud = $("hud");
let welcome = null;
let state = { paused: false, recording: false, speed: 1, chunk: 0, rewind: 0, role: "player", queue_position: 0 };
let connection = { status: "connecting" }; // the newest status event
let views = []; // one { figure, canvas, context } per view
let newest = null; // frame on the screen
let fork = null; // chunk to which the last rewind went
let firstTurn = false; // this session has not had its first turn yet

const socket = new URL(address("ws"), location.href);
socket.protocol = socket.protocol.replace("http", "ws");
const client = new Client(socket.href, {
  codecs: codecs(query.get("codec") ?? storage.getItem("minwm.codec")),
  rtc: storage.getItem("minwm.rtc") === "yes",
});
const controls = new Controls((axes, t) => client.hold(axes, t), (yaw, pitch, t) => client.turn(yaw, pitch, t));
const playback = new Playback(show, undecodable);
const map = new Minimap($("map"));
const film = new Filmstrip($("film"), (chunk) => rewind(state.chunk - chunk));
window.minwm = { client, stats: client.stats, playback, controls };

function codecs(wanted) {
  return h264 && wanted === "h264" ? ["h264", "jpeg"] : ["jpeg"];
}

function undecodable(reason) {
  if (client.codecs[0] === "jpeg") return toast(reason);
  toast(`${reason}. Using JPEG instead.`);
  client.codecs = ["jpeg"];
  $("codec").checked = false;
  client.connect();
}

// -------------------------------------------------------------------------------------------------
// Messages of the server

client.addEventListener("status", ({ detail }) => {
  if (detail.status === "closed" && !detail.reason) return; // closed by connect()
  connection = detail;
  render();
});
client.addEventListener("role", () => controls.sync());
client.addEventListener("welcome", ({ detail }) => {
  if (detail.session !== welcome?.session) startSession(detail);
  welcome = detail;
  playback.start(detail);
  setState({ ...state, ...detail });
});
client.addEventListener("state", ({ detail }) => {
  setState({ ...state, ...detail });
  if (!firstTurn || state.role !== "player") return;
  firstTurn = false;
  if (state.paused) client.command("resume"); // paused by another player
});
client.addEventListener("error", ({ detail }) => detail.fatal || toast(detail.reason));
client.addEventListener("frame", ({ detail }) => playback.push(detail));

/** Set the page up for a new session. */
function startSession(session) {
  firstTurn = true;
  document.title = `${session.title} · minwm`;
  $("title").textContent = session.title;
  views = session.views.map((name, index) => makeView(session, name, index));
  $("views").replaceChildren(...views.map(({ figure }) => figure));
  views.at(-1).figure.append(hud);
  togglePanel(!page.classList.contains("no-panel"));
  if (!session.capabilities.camera) toast("This model has no camera control: keys and mouse do not move its camera.");
}

function makeView(session, name, index) {
  const { width, height } = session;
  const title = VIEW_NAMES[name] ?? name;
  const canvas = make("canvas", {
    width, height, role: "img",
    data: { testid: index ? `canvas-${index}` : "canvas" }, aria: { label: `What the camera sees: ${title}` },
  });
  const figure = make("figure", {}, canvas);
  if (session.views.length > 1) figure.append(make("figcaption", {}, title));
  return { figure, canvas, context: canvas.getContext("2d", { alpha: false }) };
}

function show(view, image, frame) {
  const { canvas, context } = views[view];
  frame.flush ||= frame.frame < newest?.frame; // the server has restarted
  if (view === 0 && newest && !frame.flush && frame.chunk > newest.chunk) {
    film.add(newest, canvas, Math.ceil((0.5 * welcome.fps) / welcome.chunk)); // about two a second
  }
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (view > 0) return;
  if (!newest) queueMicrotask(render);
  newest = frame;
  client.shown(frame);
  map.add(frame);
  if (frame.flush) film.keep(0, frame.chunk, 0);
}

function setState(next) {
  if (next.paused || state.paused) client.stats.clearPending();
  if (state.recording && !next.recording) toast("Recorded. Save or replay it from the panel.", "good");
  state = next;
  if (document.activeElement !== $("prompt")) $("prompt").value = state.prompt ?? "";
  if (document.activeElement !== $("seed")) $("seed").value = state.seed;
  $("speed").value = state.speed;
  playback.setSpeed(state.speed);
  if (state.chunk < fork) fork = null; // a new rollout
  render();
}

// -------------------------------------------------------------------------------------------------
// Rendering

function render() {
  const { capabilities = {}, chunk = 1, fps = 1 } = welcome ?? {};
  const watching = state.role === "spectator";
  const playing = connection.status === "open" && !watching;
  const kind = connection.status === "lost" ? "lost" : connection.status === "closed" ? "fatal"
    : connection.status === "connecting" || !newest ? "connecting"
    : watching ? "watching" : state.paused ? "paused" : state.recording ? "recording" : "live";
  const message = {
    connecting: newest ? "Reconnecting …" : "Starting …",
    lost: `Connection lost. Trying again in ${Math.ceil(connection.seconds)} s.`,
    fatal: connection.reason,
  }[kind];
  page.dataset.state = $("status").dataset.state = kind;
  $("status").textContent = kind === "watching" ? `Watching · ${state.queue_position} before you` : STATES[kind];
  $("message").hidden = !message;
  $("message").classList.toggle("busy", kind !== "fatal");
  $("message-text").textContent = message ?? "";
  $("message-button").hidden = kind === "connecting";
  $("message-button").textContent = kind === "lost" ? "Try now" : "Try again";

  for (const control of document.querySelectorAll("#buttons button, #film button, #panel [name]")) {
    control.disabled = !playing;
  }
  const [pause, record] = [button("pause"), button("record")];
  pause.querySelector("use").setAttribute("href", state.paused ? "#i-resume" : "#i-pause");
  pause.querySelector("span").textContent = state.paused ? "Play" : "Pause";
  pause.setAttribute("aria-label", state.paused ? "Play" : "Pause");
  record.setAttribute("aria-pressed", state.recording);
  record.querySelector("span").textContent = state.recording ? "Stop" : "Record";
  button("rewind").disabled = !playing || !state.rewind;
  button("branch").disabled = !playing || fork === null || state.chunk <= fork;
  film.keep(state.chunk - state.rewind, state.chunk, chunk / fps);
  $("prompt").readOnly = !capabilities.prompt;
  $("prompt-button").hidden = !capabilities.prompt;
  $("image-label").hidden = !capabilities.image;
  $("rtc-label").hidden = !welcome?.rtc;
}

/** Update the latency panel. */
function renderStats() {
  const { stats } = client;
  const { queue, diffuse, decode, copy, encode } = stats.timings;
  const whole = (ms) => (Number.isFinite(ms) ? Math.round(ms) : "–");
  const made = queue + diffuse + decode + copy + encode;
  const rest = Math.max(0, stats.p50 - made); // wait for the chunk to start, network, playback
  $("p50").textContent = whole(stats.p50);
  $("p95").textContent = whole(stats.p95);
  const rows = [
    ["FPS", stats.fps.toFixed(1)], ["Chunk", `${whole(diffuse + decode + copy)} ms`, "diffuse"],
    ["Decode", `${decode.toFixed(1)} ms`, "decode"], ["Encode", `${encode.toFixed(1)} ms`, "encode"],
    ["Queue", `${queue.toFixed(1)} ms`, "queue"], ["Wait", `${whole(rest)} ms`, "rest"],
    ...(client.overRtc ? [["WebRTC", "on"]] : []),
  ];
  $("numbers").replaceChildren(...rows.map(([name, value, part]) =>
    make("div", { style: part ? `--k: ${LATENCY_PARTS[part]}` : "" }, make("dt", {}, name), make("dd", {}, value))));
  $("bar").replaceChildren(...Object.entries({ ...stats.timings, rest: rest || 0 }).map(([name, ms]) =>
    make("i", { style: `--k: ${LATENCY_PARTS[name]}; flex-grow: ${ms}` })));
  const latency = Number.isFinite(stats.p50) ? ` · ${whole(stats.p50)} ms` : "";
  hud.textContent = newest && !state.paused ? `${Math.round(stats.fps)} fps${latency}` : "";
}

function toast(text, kind = "") {
  $("toast").textContent = text;
  $("toast").className = kind;
  $("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => ($("toast").hidden = true), 6000);
}

function resize() {
  if (views.length) fitCanvases($("views"), views.map(({ canvas }) => canvas));
  map.draw();
}

function animate() {
  controls.poll();
  playback.tick();
  requestAnimationFrame(animate);
}

// -------------------------------------------------------------------------------------------------
// Controls

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
  (open ? $("panel") : views[0]?.figure)?.prepend(map.canvas); // without the panel the map lies on the first view
  resize();
}

function buildControls() {
  for (const element of document.querySelectorAll("[data-key]")) {
    element.textContent = keyName(controls.keys[element.dataset.key][0]);
  }
  for (const [group, names] of Object.entries(KEYCAPS)) {
    $(group).replaceChildren(...names.map((name) => {
      if (!name) return make("span");
      const { label } = ACTIONS[name];
      const key = keyName(controls.keys[name][0]);
      const cap = make("button", { title: label, data: { action: name }, aria: { label } }, key);
      controls.bindKeycap(cap, name);
      return cap;
    }));
  }
  $("buttons").replaceChildren(...Object.entries(BUTTONS).map(([command, label]) => make("button", {
    title: `${ACTIONS[command].label} (${keyName(controls.keys[command][0])})`,
    innerHTML: `<svg aria-hidden="true"><use href="#i-${command}"/></svg><span>${label}</span>`,
    data: { command, testid: command },
    aria: { label },
    onclick: COMMANDS[command],
  })));
  render();
}

function buildBindings() {
  $("bindings").replaceChildren(...Object.entries(ACTIONS).map(([name, { label }], index) => {
    const keys = make("kbd", {}, controls.keys[name].map(keyName).join(" ") || "none");
    const element = make("button", { type: "button" }, label, keys);
    element.onclick = () => {
      for (const other of $("bindings").children) other.removeAttribute("aria-pressed");
      element.setAttribute("aria-pressed", true);
      element.onkeydown = (event) => {
        if (event.code === "Tab") return;
        event.preventDefault();
        event.stopPropagation(); // else the new key would act at once
        if (event.code !== "Escape") controls.bind(name, event.code);
        buildBindings();
        buildControls();
        $("bindings").children[index].focus();
      };
    };
    return element;
  }));
}

/** HTTP request of a route. Throws with the server's reason if it fails. */
async function request(path, options) {
  const answer = await fetch(address(path, { session: client.session ?? "" }), options);
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

async function upload(file) {
  try {
    const image = await createImageBitmap(file);
    const scale = Math.min(1, MAX_SIDE / Math.max(image.width, image.height));
    const canvas = new OffscreenCanvas(Math.round(image.width * scale), Math.round(image.height * scale));
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    await request("image", { method: "POST", body: await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 }) });
  } catch (error) {
    toast(`${file.name} cannot be the start image: ${error.message}`);
  }
}

async function save(path, download) {
  try {
    const href = URL.createObjectURL(await (await request(path)).blob());
    make("a", { href, download }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  } catch (error) {
    toast(error.message);
  }
}

function listenToInput() {
  controls.bindMouse($("views"));
  controls.bindStick($("move-stick"), 0, 2);
  controls.bindStick($("look-stick"), 3, 4);
  controls.addEventListener("command", ({ detail }) => {
    if (!button(detail)?.disabled) COMMANDS[detail]();
  });
  controls.addEventListener("held", ({ detail }) => {
    for (const cap of document.querySelectorAll("[data-action]")) {
      cap.classList.toggle("on", detail.has(cap.dataset.action));
    }
    if (!client.input.idle) page.classList.add("moved");
  });
  $("views").addEventListener("pointerdown", () => page.classList.add("moved"));
  page.classList.toggle("touch", matchMedia("(pointer: coarse)").matches);
  addEventListener("pointerdown", ({ pointerType }) => pointerType === "touch" && page.classList.add("touch"));
  // Unfocus a clicked button, or it would take the next Space; one reached by Tab keeps the focus
  addEventListener("click", ({ detail, target }) => detail && target.closest("nav button, header button")?.blur());
}

function listenToPanel() {
  const act = (id, type, action) =>
    $(id).addEventListener(type, (event) => {
      if (type === "submit") event.preventDefault();
      action($(id));
      if (type !== "click") document.activeElement.blur(); // keys move the camera again
    });
  act("message-button", "click", () => client.connect());
  act("panel-button", "click", () => togglePanel());
  act("full", "click", () => {
    if (document.fullscreenElement) document.exitFullscreen();
    else document.documentElement.requestFullscreen();
  });
  act("prompt-form", "submit", () => client.command("prompt", { text: $("prompt").value }));
  act("seed-form", "submit", () => client.command("seed", { value: Number($("seed").value) }));
  act("dice", "click", () => client.command("seed", { value: Math.floor(10_000 * Math.random()) }));
  act("speed", "change", ({ value }) => client.command("speed", { value: Number(value) }));
  act("image", "click", (input) => (input.value = "")); // else the same file could not be chosen twice
  act("image", "change", (input) => upload(input.files[0]));
  act("replay", "click", () => client.command("replay"));
  act("save-video", "click", () => save("recording", "minwm.mp4"));
  act("save-clip", "click", () => save("clip", "minwm-clip.zip"));
  $("full").hidden = !document.fullscreenEnabled;
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    $("prompt-form").requestSubmit();
  });
}

function listenToDrops() {
  const over = (yes) => {
    page.classList.toggle("drop", yes && welcome?.capabilities.image === true && state.role === "player");
  };
  addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  addEventListener("dragleave", (event) => event.relatedTarget || over(false));
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (page.classList.contains("drop") && event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
    over(false);
  });
}

function listenToSettings() {
  $("settings-button").onclick = () => {
    controls.releaseAll();
    buildBindings();
    $("settings").showModal();
  };
  $("restore").onclick = () => {
    controls.restoreKeys();
    buildBindings();
    buildControls();
  };
  for (const [id, value] of [["sensitivity", "valueAsNumber"], ["invert", "checked"], ["sticky", "checked"]]) {
    $(id)[value] = controls[id];
    $(id).oninput = () => {
      controls[id] = $(id)[value];
      controls.save();
    };
  }
  $("rtc").checked = client.rtc;
  $("rtc").oninput = () => {
    client.rtc = $("rtc").checked;
    storage.setItem("minwm.rtc", client.rtc ? "yes" : "no");
    client.connect();
  };
  $("codec-label").hidden = !h264;
  $("codec").checked = client.codecs[0] === "h264";
  $("codec").oninput = () => {
    storage.setItem("minwm.codec", $("codec").checked ? "h264" : "jpeg");
    client.codecs = codecs(storage.getItem("minwm.codec"));
    client.connect();
  };
}

buildControls();
layout.then(buildControls, () => {}); // refused in some iframes
for (const listen of [listenToInput, listenToPanel, listenToDrops, listenToSettings]) listen();
togglePanel(!matchMedia("(max-width: 900px), (max-height: 520px)").matches);
new ResizeObserver(resize).observe($("views"));
setInterval(renderStats, 250);
animate();
client.connect();
