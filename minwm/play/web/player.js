/** From frames as they arrive to pictures at the right moment: decoding, a small buffer, pacing by media time. */

const SLACK = 10; // ms of buffer against jitter; a frame that comes later adds its lateness to what follows
const SPARE = 40; // ms that a chunk may come early; of more, a little is made up for with every chunk
const CATCH_UP = 0.1;

export class Player {
  /** `show(view, picture, frame)` draws; `fail(reason)` hears of pictures that cannot be decoded. */
  constructor(show, fail) {
    this.show = show;
    this.fail = fail;
    this.start({ views: [], chunk: 1 });
  }

  start({ views, chunk }) {
    this.views?.forEach((view) => stop(view.decoder));
    this.views?.forEach((view) => view.queue.forEach(drop));
    this.views = views.map(() => ({ queue: [], decoder: null }));
    this.most = 2 * chunk; // the chunk on the screen and the one after it
    this.epoch = null; // a frame is due at epoch + its media time / speed
    this.speed = 1;
    this.media = 0; // of the frame on the screen
    this.chunk = 0; // newest that has come
  }

  pace(speed) {
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
    if (this.epoch === null || early < 0) this.epoch = now + SLACK - frame.media / this.speed;
    else if (frame.chunk > this.chunk) this.epoch -= CATCH_UP * Math.max(0, early - SPARE);
    this.chunk = frame.chunk;
    const entry = { frame, picture: null, dropped: false };
    view.queue.push(entry);
    if (view.queue.length > this.most) {
      // The oldest unseen picture gives way; where none is decoded yet, this frame: else a slow page would show nothing
      const surplus = view.queue.find(({ picture }) => picture) ?? entry;
      view.queue.splice(view.queue.indexOf(surplus), 1);
      drop(surplus);
      if (surplus === entry && frame.kind === "jpeg") return;
    }
    try {
      if (frame.kind === "jpeg") this.#jpeg(entry);
      else this.#h264(view, entry);
    } catch (error) {
      this.#broken(entry, error);
    }
  }

  /** Draw what is due. Call once per animation frame. */
  tick() {
    const now = performance.now();
    this.views.forEach(({ queue }, index) => {
      let due = null;
      while (queue[0]?.picture && this.#due(queue[0].frame) <= now) {
        if (due?.frame.flush) this.show(index, due.picture, due.frame); // late, but nobody may miss a new start
        if (due) drop(due);
        due = queue.shift();
      }
      if (!due) return;
      this.show(index, due.picture, due.frame);
      this.media = due.frame.media;
      drop(due);
    });
  }

  #due(frame) {
    return this.epoch + frame.media / this.speed;
  }

  #jpeg(entry) {
    createImageBitmap(new Blob([entry.frame.payload], { type: "image/jpeg" })).then(
      (picture) => ready(entry, picture),
      (error) => this.#broken(entry, error),
    );
  }

  #h264(view, entry) {
    const { frame } = entry;
    if (frame.kind === "key" && view.decoder?.state !== "configured") {
      view.decoder = this.#decoder(codecOf(frame.payload));
    }
    if (view.decoder?.state !== "configured") return this.#broken(entry); // joined between key frames: wait for one
    view.decoder.coming.push(entry);
    const timestamp = Math.round(1000 * frame.media);
    view.decoder.decode(new EncodedVideoChunk({ type: frame.kind, timestamp, data: frame.payload }));
  }

  #decoder(codec) {
    const coming = []; // pictures leave a decoder in the order in which they went in
    const decoder = new VideoDecoder({
      output: (picture) => ready(coming.shift(), picture),
      error: (error) => coming.splice(0).forEach((entry) => this.#broken(entry, error)),
    });
    decoder.configure({ codec, optimizeForLatency: true });
    return Object.assign(decoder, { coming });
  }

  #broken(entry, error) {
    const { queue } = this.views[entry.frame.view] ?? { queue: [] };
    if (queue.includes(entry)) queue.splice(queue.indexOf(entry), 1);
    if (error) this.fail(`A frame cannot be decoded (${error.message.replace(/\.$/, "")})`);
  }
}

function ready(entry, picture) {
  entry.picture = picture;
  entry.decoded = performance.now();
  if (entry.dropped) picture.close();
}

function drop(entry) {
  entry.dropped = true;
  entry.picture?.close();
}

function stop(decoder) {
  if (decoder && decoder.state !== "closed") decoder.close();
}

/** WebCodecs wants profile and level by name; they are the three bytes after the type of the SPS unit. */
function codecOf(annexB) {
  const sps = annexB.findIndex(
    (byte, i) => byte === 0 && annexB[i + 1] === 0 && annexB[i + 2] === 1 && (annexB[i + 3] & 31) === 7,
  );
  if (sps < 0) throw new Error("an H.264 key frame without its parameter set");
  return `avc1.${[...annexB.subarray(sps + 4, sps + 7)].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
