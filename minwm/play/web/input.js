/** Keyboard, mouse, gamepad, on-screen keycaps and touch sticks, summed into one vector of axes (see InputState). */

/** What keys can be bound to: movements of an [axis, sign], and commands. `codes`: KeyboardEvent.code. */
export const ACTIONS = {
  forward: { label: "Forward", move: [2, 1], codes: ["KeyW"] },
  back: { label: "Back", move: [2, -1], codes: ["KeyS"] },
  left: { label: "Left", move: [0, -1], codes: ["KeyA"] },
  right: { label: "Right", move: [0, 1], codes: ["KeyD"] },
  down: { label: "Sink", move: [1, -1], codes: ["KeyQ"] },
  up: { label: "Rise", move: [1, 1], codes: ["KeyE"] },
  turnLeft: { label: "Turn left", move: [3, -1], codes: ["ArrowLeft", "KeyJ"] },
  turnRight: { label: "Turn right", move: [3, 1], codes: ["ArrowRight", "KeyL"] },
  lookUp: { label: "Look up", move: [4, 1], codes: ["ArrowUp", "KeyI"] },
  lookDown: { label: "Look down", move: [4, -1], codes: ["ArrowDown", "KeyK"] },
  pause: { label: "Pause or play", codes: ["Space"] },
  step: { label: "Step by one chunk", codes: ["Period"] },
  rewind: { label: "Back by one chunk", codes: ["Backspace"] },
  branch: { label: "Back to the last fork", codes: ["KeyB"] },
  reset: { label: "Back to the start", codes: ["KeyR"] },
  record: { label: "Record or stop", codes: ["KeyV"] },
  panel: { label: "Panel", codes: ["KeyH"] },
};
const PAD = { 4: "down", 5: "up", 6: "down", 7: "up", 12: "lookUp", 13: "lookDown", 14: "turnLeft", 15: "turnRight" };
const PAD_COMMANDS = { 0: "step", 1: "rewind", 8: "reset", 9: "pause" };
const DEAD_ZONE = 0.15; // share of a stick's travel
const STORAGE_KEY = "minwm.controls";

/** localStorage; where the browser denies it, as in some iframes, nothing is kept. */
export const storage = (() => {
  try {
    return localStorage;
  } catch {
    return { getItem: () => null, setItem: () => {} };
  }
})();

const NAMES = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Period: ".", Comma: "," };

/** Resolves when key names follow the user's keyboard layout, where the browser tells it: KeyW is Z on a French one. */
export const layout = (async () => {
  for (const [code, key] of (await navigator.keyboard?.getLayoutMap?.()) ?? []) NAMES[code] ??= key.toUpperCase();
})();

/** Label of a key code: KeyW -> W, ArrowLeft -> ←. */
export function keyName(code = "") {
  return NAMES[code] ?? code.replace(/^(Key|Digit)/, "").replace("Numpad", "Num ");
}

export class Controls extends EventTarget {
  keys = Object.fromEntries(Object.entries(ACTIONS).map(([name, action]) => [name, action.codes]));
  sensitivity = 0.12; // degrees per pixel of mouse travel
  invert = false; // mouse forward looks down
  sticky = false; // a press holds until the next press
  #pressed = new Map(); // source (a key code, cap:name, pad:button) -> movement
  #sticks = new Map(); // source -> axes
  #padDown = new Set();

  /** Calls `hold(axes, t)` and `turn(yaw, pitch, t)`; emits `command` (its name) and `held` (the set of movements). */
  constructor(hold, turn) {
    super();
    this.hold = hold;
    this.turn = turn;
    const { keys, ...rest } = JSON.parse(storage.getItem(STORAGE_KEY) ?? "{}");
    Object.assign(this.keys, keys);
    Object.assign(this, rest);
    addEventListener("keydown", (event) => this.#key(event));
    const releaseAll = () => this.releaseAll();
    addEventListener("keyup", (event) => {
      if (event.key === "Meta") releaseAll(); // macOS reports no keyup while Command is down
      else this.#release(event.code, event.timeStamp);
    });
    addEventListener("blur", releaseAll);
    document.addEventListener("visibilitychange", releaseAll);
  }

  /** Bind a key to an action, and unbind it from others. */
  bind(action, code) {
    for (const name in this.keys) this.keys[name] = this.keys[name].filter((other) => other !== code);
    this.keys[action] = [code];
    this.save();
  }

  restoreKeys() {
    for (const name in ACTIONS) this.keys[name] = ACTIONS[name].codes;
    this.save();
  }

  save() {
    const { keys, sensitivity, invert, sticky } = this;
    storage.setItem(STORAGE_KEY, JSON.stringify({ keys, sensitivity, invert, sticky }));
  }

  releaseAll() {
    this.#pressed.clear();
    this.#sticks.clear();
    this.sync(performance.now());
  }

  /** Report the held axes again, for example to a new connection. */
  sync(t = performance.now()) {
    const axes = [0, 0, 0, 0, 0, 0];
    const held = new Set(this.#pressed.values()); // a movement counts once, however many keys hold it
    for (const name of held) axes[ACTIONS[name].move[0]] += ACTIONS[name].move[1];
    for (const stick of this.#sticks.values()) stick.forEach((value, axis) => (axes[axis] += value));
    this.hold(axes.map((value) => Math.max(-1, Math.min(1, value))), t);
    this.dispatchEvent(new CustomEvent("held", { detail: held }));
  }

  #key(event) {
    const { code, target, repeat, timeStamp } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || target.closest("input, textarea, select, dialog")) return;
    if ((code === "Space" || code === "Enter") && target.closest("button, a, summary")) return; // activates that
    const name = Object.keys(this.keys).find((name) => this.keys[name].includes(code));
    if (!name) return;
    event.preventDefault();
    if (repeat) return;
    if (ACTIONS[name].move) this.#press(code, name, timeStamp);
    else this.#command(name);
  }

  #press(source, name, t) {
    const held = [...this.#pressed].filter(([, other]) => other === name);
    if (this.sticky && held.length) held.forEach(([source]) => this.#pressed.delete(source));
    else this.#pressed.set(source, name);
    this.sync(t);
  }

  #release(source, t) {
    if (!this.sticky && this.#pressed.delete(source)) this.sync(t);
  }

  #stick(source, axes, t) {
    if (axes.some(Boolean)) this.#sticks.set(source, axes);
    else if (!this.#sticks.delete(source)) return;
    this.sync(t);
  }

  #command(name) {
    this.dispatchEvent(new CustomEvent("command", { detail: name }));
  }

  /** Make a button a keycap: held while pressed by mouse, finger, Space or Enter. */
  bindKeycap(button, name) {
    const source = `cap:${name}`;
    const off = (event) => this.#release(source, event.timeStamp);
    button.addEventListener("pointerdown", (event) => {
      button.setPointerCapture(event.pointerId);
      this.#press(source, name, event.timeStamp);
    });
    for (const type of ["pointerup", "pointercancel", "blur"]) button.addEventListener(type, off);
    const activates = (event) => event.code === "Space" || event.code === "Enter";
    button.addEventListener("keydown", (event) => {
      if (activates(event) && !event.repeat) this.#press(source, name, event.timeStamp);
    });
    button.addEventListener("keyup", (event) => activates(event) && off(event));
    button.addEventListener("contextmenu", (event) => event.preventDefault()); // of a long touch
  }

  /** Make an element a touch stick that drives the axes `right` and `up`. */
  bindStick(element, right, up) {
    const knob = element.firstElementChild;
    let centre = null;
    const move = (event) => {
      if (!centre) return;
      const [x, y] = [(event.clientX - centre.x) / centre.reach, (event.clientY - centre.y) / centre.reach];
      const far = Math.max(1, Math.hypot(x, y));
      const axes = [0, 0, 0, 0, 0, 0];
      [axes[right], axes[up]] = applyDeadZone(x / far, -y / far);
      knob.style.translate = `${(x / far) * 100}% ${(y / far) * 100}%`;
      this.#stick(element.id, axes, event.timeStamp);
    };
    const end = (event) => {
      centre = null;
      element.classList.remove("on");
      knob.style.translate = "";
      this.#stick(element.id, [0, 0, 0, 0, 0, 0], event.timeStamp);
    };
    element.addEventListener("pointerdown", (event) => {
      element.setPointerCapture(event.pointerId);
      element.classList.add("on");
      const box = element.getBoundingClientRect();
      centre = { x: box.x + box.width / 2, y: box.y + box.height / 2, reach: knob.offsetWidth };
      move(event);
    });
    element.addEventListener("pointermove", move);
    for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) element.addEventListener(type, end);
  }

  /** Mouse look on an element: by dragging, or with the pointer locked by a click. */
  bindMouse(surface) {
    let last = null;
    const look = (x, y, t) => {
      const pitch = this.sensitivity * (this.invert ? y : -y);
      if (x || y) this.turn(this.sensitivity * x, pitch, t);
    };
    surface.addEventListener("pointerdown", (event) => {
      surface.setPointerCapture(event.pointerId);
      last = { x: event.clientX, y: event.clientY, start: event.timeStamp };
    });
    surface.addEventListener("pointermove", (event) => {
      if (document.pointerLockElement === surface) look(event.movementX, event.movementY, event.timeStamp);
      else if (last) {
        look(event.clientX - last.x, event.clientY - last.y, event.timeStamp);
        Object.assign(last, { x: event.clientX, y: event.clientY });
      }
    });
    surface.addEventListener("pointerup", (event) => {
      const click = last && event.timeStamp - last.start < 250 && event.pointerType === "mouse";
      last = null;
      // Some browsers return no promise; if the lock is refused, dragging still works
      if (click && !document.pointerLockElement) surface.requestPointerLock?.()?.catch?.(() => {});
    });
    surface.addEventListener("pointercancel", () => (last = null));
  }

  /** Poll the gamepads. Call once per animation frame. */
  poll() {
    for (const pad of navigator.getGamepads?.() ?? []) {
      if (!pad?.connected) continue;
      const now = performance.now();
      const [moveX, moveY] = applyDeadZone(pad.axes[0] ?? 0, -(pad.axes[1] ?? 0));
      const [yaw, pitch] = applyDeadZone(pad.axes[2] ?? 0, -(pad.axes[3] ?? 0));
      const axes = [moveX, 0, moveY, yaw, pitch, 0];
      pad.buttons.forEach(({ value, pressed }, index) => {
        const [axis, sign] = ACTIONS[PAD[index]]?.move ?? [0, 0];
        axes[axis] += sign * value;
        const id = `${pad.index}:${index}`;
        if (pressed && !this.#padDown.has(id) && PAD_COMMANDS[index]) this.#command(PAD_COMMANDS[index]);
        if (pressed) this.#padDown.add(id);
        else this.#padDown.delete(id);
      });
      this.#stick(`pad:${pad.index}`, axes, now);
    }
  }
}

/** Subtract the dead zone from a stick's position; full deflection stays 1. */
function applyDeadZone(x, y) {
  const length = Math.hypot(x, y);
  const scale = length < DEAD_ZONE ? 0 : Math.min(1, (length - DEAD_ZONE) / (1 - DEAD_ZONE)) / length;
  return [x * scale, y * scale];
}
