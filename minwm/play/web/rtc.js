/**
 * The same messages over WebRTC, for networks that lose packets: channel 0 delivers everything in order, channel 1
 * carries pictures that the next one replaces, and rather loses than holds up.
 */

const LATE = 250; // ms after which a lost picture is not sent again
const GATHER = 1000; // ms for the browser to find its own addresses
const PATIENCE = 6000; // ms until the channels must be open

/** Call the server of that WebSocket's address; resolves to what looks like a WebSocket, or rejects with a reason. */
export async function call(url) {
  if (!window.RTCPeerConnection) throw new Error("this browser has none");
  const wire = new Wire();
  const late = after(PATIENCE).then(() => Promise.reject(new Error("no way through to the server")));
  try {
    await Promise.race([wire.dial(url.replace(/^ws/, "http").replace("/ws?", "/rtc?")), late]);
    return wire;
  } catch (error) {
    wire.close();
    throw error;
  }
}

class Wire {
  onmessage = null;
  onclose = null;
  #peer = new RTCPeerConnection();
  #channels = [{}, { maxPacketLifeTime: LATE }].map((options, id) =>
    Object.assign(this.#peer.createDataChannel("minwm", { negotiated: true, id, ...options }), {
      binaryType: "arraybuffer",
      onmessage: (event) => this.onmessage?.(event),
      onclose: () => this.close(),
    }),
  );

  async dial(door) {
    addEventListener("pagehide", () => this.close()); // or the server would wait for us for half a minute
    const peer = this.#peer;
    await peer.setLocalDescription();
    const gathered = happens(peer, "icegatheringstatechange", () => peer.iceGatheringState === "complete");
    await Promise.race([gathered, after(GATHER)]);
    const answer = await fetch(door, { method: "POST", body: peer.localDescription.sdp });
    if (!answer.ok) throw new Error((await answer.json()).error);
    await peer.setRemoteDescription({ type: "answer", sdp: await answer.text() });
    await Promise.all(this.#channels.map((channel) => happens(channel, "open", () => channel.readyState === "open")));
  }

  get readyState() {
    return this.#channels[0].readyState === "open" ? WebSocket.OPEN : WebSocket.CLOSED;
  }

  send(text) {
    this.#channels[0].send(text);
  }

  close() {
    if (this.#peer.signalingState === "closed") return;
    this.#peer.close();
    this.onclose?.();
  }
}

const after = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function happens(target, event, is) {
  return new Promise((resolve) => {
    const look = () => is() && resolve();
    target.addEventListener(event, look);
    look();
  });
}
