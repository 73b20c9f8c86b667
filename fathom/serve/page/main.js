// Brings the parts together: the composer, the exchange that is running, the panels, and what happens on failure.

import { ServerError, streamed } from "./api.js";
import { byId, element, short } from "./elements.js";
import { EnginePanel } from "./engine.js";
import { askForKey } from "./key.js";
import { LoadPanel } from "./load.js";
import { newExchange, requestFor, take } from "./protocol.js";
import { Settings } from "./settings.js";
import { announce, announceEnd } from "./announce.js";
import { load, loadExchanges, save, saveExchanges } from "./storage.js";
import { bindTheme } from "./theme.js";
import { TokenPanel } from "./token.js";
import { Transcript } from "./transcript.js";
import { StatusPoll } from "./poll.js";

const WORDS = {
  chat: {
    label: "Message",
    placeholder: "Write a message",
    lead: "Write a message and the model answers. Small or large, the architecture is the same, and this page shows it at work.",
    examples: ["Explain what a generator is.", "Write a function that reverses a list.", "What is a mixture of experts?"],
  },
  completion: {
    label: "Text to continue",
    placeholder: "Write the beginning of a text",
    lead: "Write the beginning of a text and the model continues it, token by token, while this page shows the architecture at work.",
    examples: ["def read(", "import os\n\nclass ", "for name in "],
  },
};

const prompt = byId("prompt");
const settings = new Settings(byId("settings-fields"), byId("settings-summary"));
const enginePanel = new EnginePanel();
const loadPanel = new LoadPanel();
const tokenPanel = new TokenPanel({ step: (by) => transcript.step(by), close: () => transcript.select(null) });
const transcript = new Transcript(byId("turns"), byId("scroll"), { selected: showToken, retry });
const statusPoll = new StatusPoll(answered, failed);

let model = null;
let mode = null;
let exchanges = [];
let running = null; // the AbortController of the exchange that is being answered
let keyRefused = false; // the user dismissed the key dialog: it stays closed until «Try again»

function showToken(selection) {
  document.body.classList.toggle("token-open", selection !== null);
  if (selection) tokenPanel.show(selection.exchange, selection.place);
  else tokenPanel.showNothing();
}

// --- the server's status ---

function answered(status) {
  byId("trouble").hidden = true;
  if (JSON.stringify(status.model) !== JSON.stringify(model)) setModel(status.model);
  setHealth(status.now.running ? "busy" : "ready", status.now.running ? "answering" : "ready");
  enginePanel.show(status.now);
  loadPanel.show(status.now);
}

function failed(error) {
  setHealth("gone", "no answer");
  byId("trouble").hidden = false;
  if (byId("trouble-words").textContent !== error.message) byId("trouble-words").textContent = error.message;
  if (error.keyNeeded && !keyRefused) {
    askForKey(error.message).then((given) => {
      keyRefused = !given;
      if (given) statusPoll.now();
    });
  }
}

function setHealth(state, words) {
  const health = byId("health");
  if (health.textContent !== words) health.textContent = words;
  health.className = state;
}

function setModel(newModel) {
  model = newModel;
  document.title = `${model.name} · Fathom`;
  byId("model-name").replaceChildren(model.name, element("span", {}, `, ${short(model.parameters)} parameters`));
  for (const panel of [enginePanel, loadPanel, tokenPanel]) panel.setModel(model);
  byId("modes").hidden = !model.chat;
  byId("send").disabled = false;
  setMode(model.chat ? load("mode", "chat") : "completion");
}

// --- the composer ---

function setMode(chosen) {
  if (chosen === mode) return;
  stop();
  mode = chosen in WORDS ? chosen : "completion";
  exchanges = loadExchanges(mode);
  for (const radio of document.getElementsByName("mode")) radio.checked = radio.value === mode;
  byId("prompt-label").textContent = WORDS[mode].label;
  prompt.placeholder = WORDS[mode].placeholder;
  byId("empty-lead").textContent = WORDS[mode].lead;
  byId("examples").replaceChildren(...WORDS[mode].examples.map(example));
  transcript.show(mode, exchanges);
  showEmpty();
}

function example(text) {
  return element("button", { type: "button", onclick: () => send(text) }, element("code", {}, text.trim().split("\n")[0]));
}

function showEmpty() {
  byId("empty").hidden = exchanges.length > 0;
  byId("new").hidden = exchanges.length === 0;
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function submit() {
  if (running || !model || prompt.value.trim() === "") return;
  send(prompt.value);
  prompt.value = "";
  fit();
}

// --- answers ---

function send(text) {
  exchanges.push(newExchange(text));
  transcript.add(exchanges.at(-1));
  showEmpty();
  answer(exchanges.at(-1));
}

function retry() {
  if (running) return;
  const { prompt: text } = exchanges.pop();
  transcript.drop();
  send(text);
  prompt.focus({ preventScroll: true }); // the button that was pressed is gone
}

function stop() {
  running?.abort();
}

async function answer(exchange) {
  running = new AbortController();
  const { signal } = running;
  const [inMode, all] = [mode, exchanges];
  showRunning(true);
  statusPoll.now();
  let keyNeeded = false;
  try {
    const { path, body } = requestFor(inMode, all, settings.values(), model.name);
    for await (const chunk of streamed(path, body, signal)) {
      const tokens = take(inMode, exchange, chunk);
      transcript.grow(exchange, tokens);
      announce(tokens.map(({ text }) => text).join(""));
    }
    exchange.ended ??= "stop";
  } catch (failure) {
    if (signal.aborted) exchange.ended = "stopped";
    else if (failure instanceof ServerError) {
      Object.assign(exchange, { ended: "error", error: failure.message });
      keyNeeded = failure.keyNeeded;
    } else {
      Object.assign(exchange, { ended: "error", error: `The page failed: ${failure.message}.` });
      console.error(failure);
    }
  } finally {
    running = null;
    showRunning(false);
  }
  saveExchanges(inMode, all);
  if (all === exchanges && all.includes(exchange)) transcript.finish(exchange);
  announceEnd(exchange.error ? "" : `End of the answer, ${exchange.tokens.length} tokens.`);
  if (keyNeeded && (await askForKey(exchange.error))) retry();
}

function showRunning(now) {
  const focused = document.activeElement === byId("stop");
  byId("send").hidden = now;
  byId("stop").hidden = !now;
  if (focused) prompt.focus({ preventScroll: true });
}

function startAnew() {
  stop();
  exchanges.length = 0; // in place: an answer that is being stopped saves this same list
  saveExchanges(mode, exchanges);
  transcript.show(mode, exchanges);
  showEmpty();
  prompt.focus();
}

// --- the page ---

function showEngine(open) {
  document.body.classList.toggle("engine-open", open);
  byId("show-engine").setAttribute("aria-expanded", String(open));
  byId(open ? "hide-engine" : "show-engine").focus();
}

function escape() {
  if (running) stop();
  else if (document.body.classList.contains("engine-open")) showEngine(false);
  else transcript.select(null);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
byId("stop").addEventListener("click", stop);
byId("trouble-retry").addEventListener("click", () => {
  keyRefused = false;
  statusPoll.now();
});
byId("new").addEventListener("click", startAnew);
byId("modes").addEventListener("change", (event) => {
  save("mode", event.target.value);
  setMode(event.target.value);
});
byId("show-engine").addEventListener("click", () => showEngine(true));
byId("hide-engine").addEventListener("click", () => showEngine(false));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("key").open) escape();
});
addEventListener("pagehide", () => {
  if (!running) return;
  stop(); // or the connection's end would count as the server's failure
  exchanges.at(-1).ended = "stopped";
  saveExchanges(mode, exchanges);
});

bindTheme(byId("theme"));
byId("send").disabled = true;
setHealth("gone", "connecting");
tokenPanel.showNothing();
if (matchMedia("(pointer: fine)").matches) prompt.focus();
statusPoll.now();
