/**
 * The play protocol of minwm, version 1: a client without dependencies, for this page and for any other.
 *
 *   const client = new Client("ws://127.0.0.1:7860/ws?token=T");
 *   client.addEventListener("welcome", ({ detail }) => ...);   // what is played, and in which role
 *   client.addEventListener("frame", ({ detail }) => ...);     // see parseFrame
 *   client.connect();
 *   client.hold([0, 0, 1, 0, 0, 0]);                           // walk forward until told otherwise
 *   client.command("prompt", { text: "heavy rain" });
 *
 * Events: `status` (connecting | open | lost | closed, with the seconds until the next try or the reason), `role`,
 * `welcome`, `state`, `error`, `frame`. A lost connection is tried again with growing pauses and resumes its session.
 * With `rtc`, a conversation goes on over WebRTC where the server has it; if that fails, an `error` says so, and the
 * WebSocket goes on.
 * All times are milliseconds of performance.now().
 */

export const VERSION = 1;
const HEADER = 108; // bytes before the payload of a frame
const TICK = 17; // ms between two inputs: at most 60 a second
const RETRY = [0.5, 1, 2, 4, 8]; // seconds
const WINDOW = 10_000; // ms of past that statistics look at

/** A binary message as an object. Throws if it is no frame of this version. */
export function parseFrame(buffer) {
  const view = new DataView(buffer);
  if (view.byteLength < HEADER || view.getUint16(0) !== 0x4d57 || view.getUint8(2) !== VERSION) {
    throw new Error(`a message of ${view.byteLength} bytes is no frame of protocol ${VERSION}`);
  }
  const u32 = (at) => view.getUint32(at, true);
  const f32 = (at) => view.getFloat32(at, true);
  return {
    kind: ["jpeg", "key", "delta"][view.getUint8(3)],
    view: view.getUint8(4),
    flush: (view.getUint8(5) & 1) === 1, // first frame after a start, reset or rewind
    frame: u32(8),
    chunk: u32(12),
    seq: u32(16), // newest input that this frame reflects,
    sent: view.getFloat64(32, true), // and the `t` of that input
    seed: u32(20),
    media: view.getFloat64(24, true), // ms
    timings: { queue: f32(40), diffuse: f32(44), decode: f32(48), copy: f32(52), encode: f32(56) }, // ms
    camera: Float32Array.from({ length: 12 }, (_, i) => f32(60 + 4 * i)), // camera-to-world, 3x4, OpenCV axes
    payload: new Uint8Array(buffer, HEADER),
  };
}

/** Intent and its integrals, so that a tap between two chunks is not lost. */
export class InputState {
  held = [0, 0, 0, 0, 0, 0]; // right, up, forward, yaw right, pitch up, roll clockwise; each in [-1, 1]
  total = [0, 0, 0, 0, 0, 0]; // the same, integrated over seconds
  look = [0, 0]; // degrees: yaw right, pitch up
  #until = performance.now();

  advance(t) {
    const seconds = Math.max(0, t - this.#until) / 1000; // events may arrive out of order
    this.total = this.total.map((sum, axis) => sum + seconds * this.held[axis]);
    this.#until = Math.max(t, this.#until);
  }

  get idle() {
    return this.held.every((value) => value === 0);
  }
}

/** What the visitor experiences: frames per second and the time from an input to the frame that shows it. */
export class Stats {
  timings = { queue: 0, diffuse: 0, decode: 0, copy: 0, encode: 0 };
  #waiting = []; // inputs that no frame on the screen reflects yet: [seq, t]
  #latencies = []; // [when, ms]
  #frames = []; // when

  input(seq, t) {
    this.#waiting.push([seq, t]);
  }

  /** Inputs of before a pause or a reset would count the time spent there. */
  forget() {
    this.#waiting = [];
  }

  shown(frame, now) {
    if (frame.flush) this.forget();
    this.timings = frame.timings;
    this.#frames.push(now);
    // Every input counts, not only the one that the chunk began with: so the wait for a chunk's start is in
    while (this.#waiting.length && this.#waiting[0][0] <= frame.seq) {
      this.#latencies.push([now, now - this.#waiting.shift()[1]]);
    }
    while (this.#latencies.length && this.#latencies[0][0] < now - WINDOW) this.#latencies.shift();
    while (this.#frames[0] < now - 2000) this.#frames.shift();
  }

  get fps() {
    const recent = this.#frames.filter((when) => when > performance.now() - 2000);
    return recent.length < 2 ? 0 : (1000 * (recent.length - 1)) / (recent.at(-1) - recent[0]);
  }

  /** Input-to-photon milliseconds not exceeded by that share of the last 10 s; NaN without inputs. */
  latency(share) {
    const sorted = this.#latencies.map(([, ms]) => ms).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : NaN;
  }

  get p50() {
    return this.latency(0.5);
  }

  get p95() {
    return this.latency(0.95);
  }
}

export class Client extends EventTarget {
  input = new InputState();
  stats = new Stats();
  session = null;
  role = null; // player | spectator
  #url;
  #socket = null;
  #tries = 0;
  #seq = 0;
  #changed = null; // time of the oldest change that was not sent yet
  #lastSent = 0;
  #sending; // timer of the next input
  #retrying; // timer of the next connection

  /** `codecs` in order of preference: "jpeg", "h264". */
  constructor(url, { codecs = ["jpeg"], rtc = false } = {}) {
    super();
    this.#url = url;
    this.codecs = codecs;
    this.rtc = rtc;
  }

  connect() {
    this.close();
    this.#emit("status", { status: "connecting" });
    const socket = (this.#socket = new WebSocket(this.#url));
    let opened = false;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      opened = true;
      this.#hello(socket);
    };
    socket.onclose = () => this.#lost(socket, opened);
  }

  #hello(socket) {
    this.role = null;
    this.#seq = 0;
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.#receive(JSON.parse(data)) : this.#frame(data));
    this.#send({ type: "hello", v: VERSION, codecs: this.codecs, resume: this.session });
  }

  /** Whether this conversation is over WebRTC. */
  get overRtc() {
    return this.#socket !== null && !(this.#socket instanceof WebSocket);
  }

  /** Have this conversation over WebRTC from now on; if that fails, say so and stay. */
  async #changeOver() {
    const socket = this.#socket;
    const stay = (reason) => {
      this.rtc = false;
      this.#emit("error", { reason: `WebRTC: ${reason}. Going on over a WebSocket.`, fatal: false });
    };
    try {
      const { call } = await import("./rtc.js");
      const wire = await call(this.#url);
      if (socket !== this.#socket) return wire.close();
      socket.onmessage = socket.onclose = null;
      this.#socket = wire;
      wire.onclose = () => {
        if (wire !== this.#socket) return;
        stay("the connection broke");
        this.connect();
      };
      this.#hello(wire);
      socket.close();
    } catch (error) {
      if (socket === this.#socket) stay(error.message);
    }
  }

  /** Leave for good, until `connect` is called again. */
  close(reason = "") {
    clearTimeout(this.#retrying);
    clearTimeout(this.#sending);
    this.#sending = undefined;
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
    if (socket) this.#emit("status", { status: "closed", reason });
  }

  command(name, values = {}) {
    this.#send({ type: "command", name, ...values });
  }

  /** Tell the server which frame is on the screen: it makes at most one chunk more. */
  shown(frame, now = performance.now()) {
    this.stats.shown(frame, now);
    this.#send({ type: "shown", frame: frame.frame });
  }

  /** Intent from now on; nothing while another plays. */
  hold(axes, t = performance.now()) {
    if (this.role !== "player") return;
    if (axes.every((value, axis) => value === this.input.held[axis])) return;
    this.input.advance(t);
    this.input.held = [...axes];
    this.#change(t);
  }

  /** Mouse look, degrees to the right and up. */
  turn(yaw, pitch, t = performance.now()) {
    if (this.role !== "player") return;
    this.input.look = [this.input.look[0] + yaw, this.input.look[1] + pitch];
    this.#change(t);
  }

  #change(t) {
    this.#changed ??= t;
    this.#sending ??= setTimeout(() => this.#sendInput(), this.#lastSent + TICK - performance.now());
  }

  #sendInput() {
    const now = performance.now();
    this.#sending = undefined;
    this.input.advance(now);
    const { held, total, look } = this.input;
    const t = this.#changed ?? now;
    if (this.#send({ type: "input", seq: ++this.#seq, t, held, total, look })) this.stats.input(this.#seq, t);
    this.#changed = null;
    this.#lastSent = now;
    if (!this.input.idle && this.#socket) this.#sending = setTimeout(() => this.#sendInput(), TICK); // totals grow
  }

  #send(message) {
    const open = this.#socket?.readyState === WebSocket.OPEN;
    if (open) this.#socket.send(JSON.stringify(message));
    return open;
  }

  #receive(message) {
    if (message.type === "welcome") {
      this.session = message.session;
      this.#tries = 0;
      this.#emit("status", { status: "open" });
      if (this.rtc && message.rtc && !this.overRtc) this.#changeOver();
    }
    if (message.role && message.role !== this.role) this.#begin(message.role);
    this.#emit(message.type, message);
    if (message.type === "error" && message.fatal) this.close(message.reason);
  }

  /** A turn begins or ends: what was done before it counts for nothing. */
  #begin(role) {
    this.role = role;
    this.input = new InputState();
    this.stats.forget();
    this.#changed = null;
    this.#emit("role", { role });
  }

  #frame(data) {
    this.#emit("frame", { ...parseFrame(data), received: performance.now() });
  }

  async #lost(socket, opened) {
    if (socket !== this.#socket) return; // closed by us
    const refused = opened ? null : await this.#refusal();
    if (socket !== this.#socket) return;
    if (refused) return this.close(refused);
    const seconds = RETRY[Math.min(this.#tries++, RETRY.length - 1)] * (1 + 0.2 * Math.random());
    this.#emit("status", { status: "lost", seconds });
    this.#retrying = setTimeout(() => this.connect(), 1000 * seconds);
  }

  /** A browser hides why a WebSocket was refused, so ask the same door by HTTP: the sentence of a 403, else null. */
  async #refusal() {
    const url = this.#url.replace(/^ws/, "http");
    const answer = await fetch(url).catch(() => null);
    return answer?.status === 403 ? answer.text() : null;
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
