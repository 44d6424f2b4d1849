/** WebRTC in place of the WebSocket, for networks that lose packets. The two data channels: minwm/play/rtc.py. */

const MAX_PACKET_LIFETIME = 250; // ms after which a lost frame is not retransmitted
const GATHER_TIMEOUT = 1000; // ms for gathering ICE candidates
const OPEN_TIMEOUT = 6000; // ms in which the channels must open

/** Connect to the server of a WebSocket URL. Resolves to an object with a WebSocket's interface. */
export async function connectRtc(url) {
  if (!window.RTCPeerConnection) throw new Error("not supported by this browser");
  const socket = new RtcSocket();
  const timeout = sleep(OPEN_TIMEOUT).then(() => Promise.reject(new Error("the server cannot be reached")));
  try {
    await Promise.race([socket.connect(url.replace(/^ws/, "http").replace("/ws?", "/rtc?")), timeout]);
    return socket;
  } catch (error) {
    socket.close();
    throw error;
  }
}

class RtcSocket {
  onmessage = null;
  onclose = null;
  #peer = new RTCPeerConnection();
  #channels = [{}, { maxPacketLifeTime: MAX_PACKET_LIFETIME }].map((options, id) =>
    Object.assign(this.#peer.createDataChannel("minwm", { negotiated: true, id, ...options }), {
      binaryType: "arraybuffer",
      onmessage: (event) => this.onmessage?.(event),
      onclose: () => this.close(),
    }),
  );

  async connect(url) {
    addEventListener("pagehide", () => this.close()); // else the server notices only after half a minute
    const peer = this.#peer;
    await peer.setLocalDescription();
    const gathered = until(peer, "icegatheringstatechange", () => peer.iceGatheringState === "complete");
    await Promise.race([gathered, sleep(GATHER_TIMEOUT)]);
    const answer = await fetch(url, { method: "POST", body: peer.localDescription.sdp });
    if (!answer.ok) throw new Error((await answer.json()).error);
    await peer.setRemoteDescription({ type: "answer", sdp: await answer.text() });
    await Promise.all(this.#channels.map((channel) => until(channel, "open", () => channel.readyState === "open")));
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

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Resolves when `condition` holds, tested now and at every `event`. */
function until(target, event, condition) {
  return new Promise((resolve) => {
    const check = () => condition() && resolve();
    target.addEventListener(event, check);
    check();
  });
}
