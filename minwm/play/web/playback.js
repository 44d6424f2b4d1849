/** Decodes frames as they arrive and shows each at its media time, through a small jitter buffer. */

const JITTER_BUFFER = 10; // ms; a frame that is later than this delays all that follow
const MAX_EARLY = 40; // ms that a chunk may arrive early
const CATCH_UP = 0.1; // share of the excess that each chunk makes up for

export class Playback {
  /** `show(view, image, frame)` draws a frame; `onError(reason)` is called when one cannot be decoded. */
  constructor(show, onError) {
    this.show = show;
    this.onError = onError;
    this.start({ views: [], chunk: 1 });
  }

  start({ views, chunk }) {
    this.views?.forEach((view) => stop(view.decoder));
    this.views?.forEach((view) => view.queue.forEach(drop));
    this.views = views.map(() => ({ queue: [], decoder: null }));
    this.maxQueued = 2 * chunk; // the chunk on the screen and the next one
    this.epoch = null; // a frame is due at epoch + its media time / speed
    this.speed = 1;
    this.media = 0; // media time of the frame on the screen
    this.chunk = 0; // newest received
  }

  setSpeed(speed) {
    if (this.epoch !== null) this.epoch += this.media / this.speed - this.media / speed;
    this.speed = speed;
  }

  push(frame) {
    const view = this.views[frame.view];
    if (!view) return;
    if (frame.flush) {
      view.queue.splice(0).forEach(drop);
      if (frame.view === 0) this.epoch = null;
    }
    const now = performance.now();
    const early = this.#due(frame) - now;
    if (this.epoch === null || early < 0) this.epoch = now + JITTER_BUFFER - frame.media / this.speed;
    else if (frame.chunk > this.chunk) this.epoch -= CATCH_UP * Math.max(0, early - MAX_EARLY);
    this.chunk = frame.chunk;
    const entry = { frame, image: null, dropped: false };
    view.queue.push(entry);
    if (view.queue.length > this.maxQueued) {
      // Drop the oldest decoded frame, else this one: dropping what is being decoded, a slow page would show nothing
      const surplus = view.queue.find(({ image }) => image) ?? entry;
      view.queue.splice(view.queue.indexOf(surplus), 1);
      drop(surplus);
      if (surplus === entry && frame.kind === "jpeg") return;
    }
    try {
      if (frame.kind === "jpeg") this.#jpeg(entry);
      else this.#h264(view, entry);
    } catch (error) {
      this.#undecodable(entry, error);
    }
  }

  /** Draw what is due. Call once per animation frame. */
  tick() {
    const now = performance.now();
    this.views.forEach(({ queue }, index) => {
      let due = null;
      while (queue[0]?.image && this.#due(queue[0].frame) <= now) {
        if (due?.frame.flush) this.show(index, due.image, due.frame); // late, but a flush must be shown
        if (due) drop(due);
        due = queue.shift();
      }
      if (!due) return;
      this.show(index, due.image, due.frame);
      this.media = due.frame.media;
      drop(due);
    });
  }

  #due(frame) {
    return this.epoch + frame.media / this.speed;
  }

  #jpeg(entry) {
    createImageBitmap(new Blob([entry.frame.payload], { type: "image/jpeg" })).then(
      (image) => ready(entry, image),
      (error) => this.#undecodable(entry, error),
    );
  }

  #h264(view, entry) {
    const { frame } = entry;
    if (frame.kind === "key" && view.decoder?.state !== "configured") {
      view.decoder = this.#decoder(codecOf(frame.payload));
    }
    if (view.decoder?.state !== "configured") return this.#undecodable(entry); // wait for a key frame
    view.decoder.pending.push(entry);
    const timestamp = Math.round(1000 * frame.media);
    view.decoder.decode(new EncodedVideoChunk({ type: frame.kind, timestamp, data: frame.payload }));
  }

  #decoder(codec) {
    const pending = []; // a decoder keeps the order of its frames
    const decoder = new VideoDecoder({
      output: (image) => ready(pending.shift(), image),
      error: (error) => pending.splice(0).forEach((entry) => this.#undecodable(entry, error)),
    });
    decoder.configure({ codec, optimizeForLatency: true });
    return Object.assign(decoder, { pending });
  }

  #undecodable(entry, error) {
    const { queue } = this.views[entry.frame.view] ?? { queue: [] };
    if (queue.includes(entry)) queue.splice(queue.indexOf(entry), 1);
    if (error) this.onError(`A frame cannot be decoded (${error.message.replace(/\.$/, "")})`);
  }
}

function ready(entry, image) {
  entry.image = image;
  entry.decoded = performance.now();
  if (entry.dropped) image.close();
}

function drop(entry) {
  entry.dropped = true;
  entry.image?.close();
}

function stop(decoder) {
  if (decoder && decoder.state !== "closed") decoder.close();
}

/** The WebCodecs codec string: profile and level are the three bytes after the type of the SPS unit. */
function codecOf(annexB) {
  const sps = annexB.findIndex(
    (byte, i) => byte === 0 && annexB[i + 1] === 0 && annexB[i + 2] === 1 && (annexB[i + 3] & 31) === 7,
  );
  if (sps < 0) throw new Error("an H.264 key frame without SPS");
  return `avc1.${[...annexB.subarray(sps + 4, sps + 7)].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
