/** What is drawn besides the pictures: their size, the map of the camera's path, the film of past chunks. */

/** An element with properties (of which `data` and `aria` are sets of attributes) and children. */
export function make(tag, { data = {}, aria = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

export const CRISP = 192; // pictures up to this many pixels show their pixels; larger ones are smoothed

/** Size the canvases to the largest common scale that fits the box: side by side, or stacked if much larger so. */
export function fit(box, canvases) {
  const { width, height } = canvases[0];
  const [wide, high, gap, n] = [box.clientWidth, box.clientHeight, 12, canvases.length];
  const row = Math.min((wide - gap * (n - 1)) / n / width, high / height);
  const column = Math.min(wide / width, (high - gap * (n - 1)) / n / height);
  const stacked = column > 1.25 * row;
  let scale = stacked ? column : row;
  const crisp = Math.max(width, height) <= CRISP;
  // Every pixel becomes the same whole number of screen pixels
  if (crisp && scale > 1) scale = Math.floor(scale * devicePixelRatio) / devicePixelRatio;
  box.classList.toggle("stacked", stacked);
  for (const canvas of canvases) {
    canvas.style.width = `${width * scale}px`;
    canvas.style.height = `${height * scale}px`;
    canvas.classList.toggle("crisp", crisp);
  }
}

/** The camera's path from above: x to the right, z up, scaled to fit; ways given up by a rewind stay as shadows. */
export class Minimap {
  #path = []; // { frame, x, z }
  #ghosts = [];
  #heading = [0, 1];

  constructor(canvas) {
    this.canvas = canvas;
  }

  add({ frame, flush, camera }) {
    if (flush) {
      const kept = this.#path.findIndex((point) => point.frame >= frame);
      if (kept >= 0) this.#ghosts = [...this.#ghosts.slice(-7), this.#path.splice(kept)];
      if (kept === 0) [this.#path, this.#ghosts] = [[], []];
    }
    this.#path.push({ frame, x: camera[3], z: camera[11] });
    this.#heading = [camera[2], camera[10]];
    if (this.#path.length > 4000) this.#path = this.#path.filter((_, i) => i % 2); // hours of walking
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    if (!wide || !this.#path.length) return;
    canvas.width = wide * devicePixelRatio;
    canvas.height = high * devicePixelRatio;
    const points = [...this.#path, ...this.#ghosts.flat()];
    const [xs, zs] = [points.map(({ x }) => x), points.map(({ z }) => z)];
    const [left, right] = [Math.min(...xs), Math.max(...xs)];
    const [near, far] = [Math.min(...zs), Math.max(...zs)];
    const room = 0.7 * Math.min(wide, high);
    const scale = Math.min((wide - high + room) / Math.max(right - left, 2), room / Math.max(far - near, 2));
    const [x0, z0] = [(left + right) / 2, (near + far) / 2];
    const place = ({ x, z }) => [wide / 2 + (x - x0) * scale, high / 2 - (z - z0) * scale];
    const pen = canvas.getContext("2d");
    pen.scale(devicePixelRatio, devicePixelRatio);
    this.#grid(pen, place, scale, wide, high);
    for (const ghost of this.#ghosts) trace(pen, ghost.map(place), "#8b94a54d", 1.5);
    trace(pen, this.#path.map(place), "#7fb2ff", 2);
    pen.fillStyle = "#8b94a5";
    pen.beginPath();
    pen.arc(...place(this.#path[0]), 3, 0, 7);
    pen.fill();
    this.#camera(pen, ...place(this.#path.at(-1)), Math.min(30, high / 4));
  }

  /** A line for every world unit, or for every 5, 25, ... once those would be too dense. */
  #grid(pen, place, scale, wide, high) {
    const step = scale * 5 ** Math.max(0, Math.ceil(Math.log(14 / scale) / Math.log(5)));
    const [x0, z0] = place({ x: 0, z: 0 });
    pen.strokeStyle = "#ffffff0d";
    pen.beginPath();
    for (let x = x0 % step; x < wide; x += step) pen.rect(x, -1, 0, high + 2);
    for (let z = z0 % step; z < high; z += step) pen.rect(-1, z, wide + 2, 0);
    pen.stroke();
  }

  #camera(pen, x, y, reach) {
    const angle = Math.atan2(this.#heading[0], this.#heading[1]);
    pen.translate(x, y);
    pen.rotate(angle);
    const cone = pen.createRadialGradient(0, 0, 2, 0, 0, reach);
    cone.addColorStop(0, "#ffd45cb0");
    cone.addColorStop(1, "#ffd45c00");
    pen.fillStyle = cone;
    pen.beginPath();
    pen.moveTo(0, 0);
    pen.arc(0, 0, reach, -Math.PI / 2 - 0.5, -Math.PI / 2 + 0.5);
    pen.fill();
    pen.fillStyle = "#ffd45c";
    pen.beginPath();
    pen.arc(0, 0, 4, 0, 7);
    pen.fill();
  }
}

function trace(pen, points, colour, width) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.lineJoin = pen.lineCap = "round";
  pen.beginPath();
  points.forEach((point) => pen.lineTo(...point));
  pen.stroke();
}

/** The last picture of every chunk to which one can go back; `go(chunk)` does. */
export class Film {
  #chunks = []; // oldest first: { chunk, camera, button }

  constructor(list, go) {
    this.list = list;
    this.go = go;
  }

  /** Take the frame that the canvas shows, unless it is too near to the last one in time, or from the same place. */
  add({ chunk, camera }, canvas, every) {
    const last = this.#chunks.at(-1);
    if (last && (chunk - last.chunk < every || camera.every((value, i) => value === last.camera[i]))) return;
    const thumb = make("canvas", { height: 80, width: Math.round((80 * canvas.width) / canvas.height) });
    thumb.getContext("2d").drawImage(canvas, 0, 0, thumb.width, thumb.height);
    const button = make("button", { onclick: () => this.go(chunk) }, thumb);
    this.list.append(make("li", {}, button));
    this.#chunks.push({ chunk, camera, button });
    this.list.scrollLeft = this.list.scrollWidth;
  }

  /** Keep the chunks from `first` to before `now`, and name them by how far back they are. */
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
