/**
 * A client of the minwm play protocol, version 2, without dependencies: for this page and for any other.
 *
 *   const client = new Client("ws://127.0.0.1:7860/ws?token=T");
 *   client.addEventListener("welcome", ({ detail }) => ...);   // see Welcome in minwm/play/protocol.py
 *   client.addEventListener("frame", ({ detail }) => ...);     // see parseFrame
 *   client.connect();
 *   client.hold([0, 0, 1, 0, 0, 0]);                           // move forward until the next hold()
 *   client.command("prompt", { text: "heavy rain" });
 *
 * Events: `status` (connecting | open | lost | closed, with the seconds until the next try or the reason), `role`,
 * `welcome`, `state`, `error`, `frame`. After a lost connection it reconnects, with growing delays, and resumes its
 * session. With `rtc`, it switches to WebRTC where the server offers it; if that fails, it emits an `error` and stays
 * on the WebSocket. All times are milliseconds of performance.now().
 */

export const VERSION = 2;
const HEADER = 108; // bytes before the payload of a frame
const INPUT_INTERVAL = 17; // ms between two input messages
const RETRY_DELAYS = [0.5, 1, 2, 4, 8]; // seconds
const STATS_WINDOW = 10_000; // ms

/** Parse a binary message (Header in protocol.py). Throws if it is not a frame of this version. */
export function parseFrame(buffer) {
  const view = new DataView(buffer);
  if (view.byteLength < HEADER || view.getUint16(0) !== 0x4d57 || view.getUint8(2) !== VERSION) {
    throw new Error(`a message of ${view.byteLength} bytes is not a frame of protocol ${VERSION}`);
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

/** Held axes and their integrals over time, so that a tap between two chunks is not lost. */
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

/** Frames per second, and the latency from an input to the display of the frame that reflects it. */
export class Stats {
  timings = { queue: 0, diffuse: 0, decode: 0, copy: 0, encode: 0 };
  #pending = []; // inputs that no displayed frame reflects yet: [seq, t]
  #latencies = []; // [when, ms]
  #frames = []; // when

  input(seq, t) {
    this.#pending.push([seq, t]);
  }

  /** Drop pending inputs: their latency would include the pause or the reset. */
  clearPending() {
    this.#pending = [];
  }

  shown(frame, now) {
    if (frame.flush) this.clearPending();
    this.timings = frame.timings;
    this.#frames.push(now);
    // All inputs up to `seq`, not only the newest: their wait for the chunk to start counts
    while (this.#pending.length && this.#pending[0][0] <= frame.seq) {
      this.#latencies.push([now, now - this.#pending.shift()[1]]);
    }
    while (this.#latencies.length && this.#latencies[0][0] < now - STATS_WINDOW) this.#latencies.shift();
    while (this.#frames[0] < now - 2000) this.#frames.shift();
  }

  get fps() {
    const recent = this.#frames.filter((when) => when > performance.now() - 2000);
    return recent.length < 2 ? 0 : (1000 * (recent.length - 1)) / (recent.at(-1) - recent[0]);
  }

  /** Quantile of the input-to-photon latency over the last 10 s, ms; NaN without inputs. */
  latency(quantile) {
    const sorted = this.#latencies.map(([, ms]) => ms).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(quantile * sorted.length))] : NaN;
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
  #attempts = 0;
  #seq = 0;
  #changed = null; // time of the oldest input change that was not sent yet
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
      this.role = null;
      this.#hello(socket);
    };
    socket.onclose = () => this.#disconnected(socket, opened);
  }

  #hello(socket) {
    this.#seq = 0;
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.#receive(JSON.parse(data)) : this.#frame(data));
    this.#send({ type: "hello", v: VERSION, codecs: this.codecs, resume: this.session });
  }

  /** Whether the connection is over WebRTC. */
  get overRtc() {
    return this.#socket !== null && !(this.#socket instanceof WebSocket);
  }

  /** Replace the WebSocket by WebRTC; if that fails, emit an error and keep the WebSocket. */
  async #switchToRtc() {
    const socket = this.#socket;
    const giveUp = (reason) => {
      this.rtc = false;
      this.#emit("error", { reason: `WebRTC: ${reason}. Using the WebSocket instead.`, fatal: false });
    };
    try {
      const { connectRtc } = await import("./rtc.js");
      const rtc = await connectRtc(this.#url);
      if (socket !== this.#socket) return rtc.close();
      socket.onmessage = socket.onclose = null;
      this.#socket = rtc;
      rtc.onclose = () => {
        if (rtc !== this.#socket) return;
        giveUp("the connection broke");
        this.connect();
      };
      this.#hello(rtc);
      this.#startTurn(this.role); // keys count before the welcome: the player notices no switch
      socket.close();
    } catch (error) {
      if (socket === this.#socket) giveUp(error.message);
    }
  }

  /** Close the connection, without reconnecting. */
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

  /** Acknowledge the frame on the screen: the server generates at most one chunk ahead of it. */
  shown(frame, now = performance.now()) {
    this.stats.shown(frame, now);
    this.#send({ type: "shown", frame: frame.frame });
  }

  /** Set the held axes, see InputState; ignored for a spectator. */
  hold(axes, t = performance.now()) {
    if (this.role !== "player") return;
    if (axes.every((value, axis) => value === this.input.held[axis])) return;
    this.input.advance(t);
    this.input.held = [...axes];
    this.#change(t);
  }

  /** Add mouse look, degrees to the right and up; ignored for a spectator. */
  turn(yaw, pitch, t = performance.now()) {
    if (this.role !== "player") return;
    this.input.look = [this.input.look[0] + yaw, this.input.look[1] + pitch];
    this.#change(t);
  }

  #change(t) {
    this.#changed ??= t;
    this.#sending ??= setTimeout(() => this.#sendInput(), this.#lastSent + INPUT_INTERVAL - performance.now());
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
    if (this.input.idle || !this.#socket) return;
    this.#sending = setTimeout(() => this.#sendInput(), INPUT_INTERVAL); // the totals grow
  }

  #send(message) {
    const open = this.#socket?.readyState === WebSocket.OPEN;
    if (open) this.#socket.send(JSON.stringify(message));
    return open;
  }

  #receive(message) {
    if (message.type === "welcome") {
      this.session = message.session;
      this.#attempts = 0;
      this.#emit("status", { status: "open" });
      if (this.rtc && message.rtc && !this.overRtc) this.#switchToRtc();
    }
    if (message.role && message.role !== this.role) this.#startTurn(message.role);
    this.#emit(message.type, message);
    if (message.type === "error" && message.fatal) this.close(message.reason);
  }

  /** A turn starts or ends: input starts again from zero. */
  #startTurn(role) {
    this.role = role;
    this.input = new InputState();
    this.stats.clearPending();
    this.#changed = null;
    this.#emit("role", { role });
  }

  #frame(data) {
    this.#emit("frame", { ...parseFrame(data), received: performance.now() });
  }

  async #disconnected(socket, opened) {
    if (socket !== this.#socket) return; // closed by us
    const refused = opened ? null : await this.#refusal();
    if (socket !== this.#socket) return;
    if (refused) return this.close(refused);
    const seconds = RETRY_DELAYS[Math.min(this.#attempts++, RETRY_DELAYS.length - 1)] * (1 + 0.2 * Math.random());
    this.#emit("status", { status: "lost", seconds });
    this.#retrying = setTimeout(() => this.connect(), 1000 * seconds);
  }

  /** The text of a 403, else null. Browsers hide why a WebSocket was refused; a POST, too, has the Origin header. */
  async #refusal() {
    const url = this.#url.replace(/^ws/, "http").replace("/ws?", "/rtc?");
    const answer = await fetch(url, { method: "POST" }).catch(() => null);
    return answer?.status === 403 ? answer.text() : null;
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
