/** Canvas sizes, the map of the camera's path, and the filmstrip of past chunks. */

/** Create an element with properties (`data` and `aria` are objects of attributes) and children. */
export function make(tag, { data = {}, aria = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

/** Size the canvases to the largest common scale that fits the box: side by side, or stacked if much larger so. */
export function fitCanvases(box, canvases) {
  const { width, height } = canvases[0];
  const [wide, high, gap, n] = [box.clientWidth, box.clientHeight, 12, canvases.length];
  const row = Math.min((wide - gap * (n - 1)) / n / width, high / height);
  const column = Math.min(wide / width, (high - gap * (n - 1)) / n / height);
  const stacked = column > 1.25 * row;
  const scale = stacked ? column : row;
  box.classList.toggle("stacked", stacked);
  for (const canvas of canvases) {
    canvas.style.width = `${width * scale}px`;
    canvas.style.height = `${height * scale}px`;
  }
}

/** The camera's path from above: x to the right, z up, scaled to fit; paths before a rewind are dimmed. */
export class Minimap {
  #path = []; // { frame, x, z }
  #abandoned = [];
  #heading = [0, 1];

  constructor(canvas) {
    this.canvas = canvas;
  }

  add({ frame, flush, camera }) {
    if (flush) {
      const kept = this.#path.findIndex((point) => point.frame >= frame);
      if (kept >= 0) this.#abandoned = [...this.#abandoned.slice(-7), this.#path.splice(kept)];
      if (kept === 0) [this.#path, this.#abandoned] = [[], []];
    }
    this.#path.push({ frame, x: camera[3], z: camera[11] });
    this.#heading = [camera[2], camera[10]];
    if (this.#path.length > 4000) this.#path = this.#path.filter((_, i) => i % 2); // after hours
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    if (!wide || !this.#path.length) return;
    canvas.width = wide * devicePixelRatio;
    canvas.height = high * devicePixelRatio;
    const points = [...this.#path, ...this.#abandoned.flat()];
    const [xs, zs] = [points.map(({ x }) => x), points.map(({ z }) => z)];
    const [left, right] = [Math.min(...xs), Math.max(...xs)];
    const [near, far] = [Math.min(...zs), Math.max(...zs)];
    const extent = 0.7 * Math.min(wide, high);
    const scale = Math.min((wide - high + extent) / Math.max(right - left, 2), extent / Math.max(far - near, 2));
    const [x0, z0] = [(left + right) / 2, (near + far) / 2];
    const toCanvas = ({ x, z }) => [wide / 2 + (x - x0) * scale, high / 2 - (z - z0) * scale];
    const context = canvas.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    this.#grid(context, toCanvas, scale, wide, high);
    for (const path of this.#abandoned) trace(context, path.map(toCanvas), "#8b94a54d", 1.5);
    trace(context, this.#path.map(toCanvas), "#7fb2ff", 2);
    context.fillStyle = "#8b94a5";
    context.beginPath();
    context.arc(...toCanvas(this.#path[0]), 3, 0, 7);
    context.fill();
    this.#camera(context, ...toCanvas(this.#path.at(-1)), Math.min(30, high / 4));
  }

  /** A line per world unit, or per 5, 25, ... units where those would be too dense. */
  #grid(context, toCanvas, scale, wide, high) {
    const step = scale * 5 ** Math.max(0, Math.ceil(Math.log(14 / scale) / Math.log(5)));
    const [x0, z0] = toCanvas({ x: 0, z: 0 });
    context.strokeStyle = "#ffffff0d";
    context.beginPath();
    for (let x = x0 % step; x < wide; x += step) context.rect(x, -1, 0, high + 2);
    for (let z = z0 % step; z < high; z += step) context.rect(-1, z, wide + 2, 0);
    context.stroke();
  }

  #camera(context, x, y, reach) {
    const angle = Math.atan2(this.#heading[0], this.#heading[1]);
    context.translate(x, y);
    context.rotate(angle);
    const cone = context.createRadialGradient(0, 0, 2, 0, 0, reach);
    cone.addColorStop(0, "#ffd45cb0");
    cone.addColorStop(1, "#ffd45c00");
    context.fillStyle = cone;
    context.beginPath();
    context.moveTo(0, 0);
    context.arc(0, 0, reach, -Math.PI / 2 - 0.5, -Math.PI / 2 + 0.5);
    context.fill();
    context.fillStyle = "#ffd45c";
    context.beginPath();
    context.arc(0, 0, 4, 0, 7);
    context.fill();
  }
}

function trace(context, points, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.lineJoin = context.lineCap = "round";
  context.beginPath();
  points.forEach((point) => context.lineTo(...point));
  context.stroke();
}

/** Thumbnails of the chunks that can be rewound to; `onSelect(chunk)` is called on a click. */
export class Filmstrip {
  #chunks = []; // oldest first: { chunk, camera, button }

  constructor(list, onSelect) {
    this.list = list;
    this.onSelect = onSelect;
  }

  /** Add the frame on the canvas, unless the last one is less than `interval` chunks ago or from the same pose. */
  add({ chunk, camera }, canvas, interval) {
    const last = this.#chunks.at(-1);
    if (last && (chunk - last.chunk < interval || camera.every((value, i) => value === last.camera[i]))) return;
    const thumb = make("canvas", { height: 80, width: Math.round((80 * canvas.width) / canvas.height) });
    thumb.getContext("2d").drawImage(canvas, 0, 0, thumb.width, thumb.height);
    const button = make("button", { onclick: () => this.onSelect(chunk) }, thumb);
    this.list.append(make("li", {}, button));
    this.#chunks.push({ chunk, camera, button });
    this.list.scrollLeft = this.list.scrollWidth;
  }

  /** Keep the chunks `first` to `now - 1`, and label each with its age. `seconds`: per chunk. */
  keep(first, now, seconds) {
    this.#chunks = this.#chunks.filter(({ chunk, button }) => {
      const kept = first <= chunk && chunk < now;
      if (!kept) button.parentElement.remove();
      button.title = `Go back ${((now - chunk) * seconds).toFixed(1)} s and take another way`;
      button.setAttribute("aria-label", button.title);
      return kept;
    });
  }
}
