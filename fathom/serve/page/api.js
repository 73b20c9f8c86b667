// The server's HTTP interface: status, streamed responses, the API key, and errors as sentences.

const KEY = "fathom.key";

/** What went wrong, as a sentence for people; `keyNeeded` where another API key may help. */
export class ServerError extends Error {
  constructor(sentence, keyNeeded = false) {
    super(sentence);
    this.keyNeeded = keyNeeded;
  }
}

/** In sessionStorage: it is gone when the tab is closed. */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** GET /fathom/status */
export async function getStatus() {
  const response = await request("/fathom/status", { signal: AbortSignal.timeout(10000) });
  return response.json();
}

/** The chunks of a streamed response, parsed. Throws ServerError also where the stream breaks off. */
export async function* streamed(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(sentence("The server stopped", chunk.error.message));
    yield chunk;
  }
  throw new ServerError("The connection ended before the answer was complete.");
}

async function request(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (failure) {
    if (failure.name === "AbortError") throw failure;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await failureOf(response, key);
  return response;
}

async function failureOf(response, key) {
  if (response.status === 401) {
    return new ServerError(key ? "The server does not accept this key." : "The server requires an API key.", true);
  }
  const message = await response.json().then((body) => body.error.message).catch(() => `status ${response.status}`);
  if (response.status === 429) return new ServerError(sentence("The server is busy", message));
  return new ServerError(sentence(response.status < 500 ? "The server refused the request" : "The server failed", message));
}

function sentence(beginning, message) {
  const whole = `${beginning}: ${message}`.trim();
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

/** The data of server-sent events; the page needs no other field of them. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    while (true) {
      const { done, value } = await read(reader);
      if (done) return;
      const lines = (buffer + value).split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trimStart();
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // it may have failed already, which was reported
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (failure) {
    if (failure.name === "AbortError") throw failure;
    throw new ServerError("The connection broke before the answer was complete.");
  }
}
