// The engine panel's figures: speed, drafts, requests, the cache held against plain attention's, and the model's facts.

import { byId, bytes, count, element, percent, rough, short } from "./elements.js";

const POINTS = 60; // points of the speed's line

export class EnginePanel {
  constructor() {
    this.speeds = [];
    this.most = 0;
    this.tiles = Object.fromEntries(
      [["speed", "tokens per second"], ["drafts", "acceptance rate"], ["requests", "requests running"], ["written", "tokens generated"]]
        .map(([name, label]) => [name, tile(name, label)]),
    );
    byId("now").append(...Object.values(this.tiles).map(({ root }) => root));
    this.line = sparkline();
    this.tiles.speed.root.append(this.line);
    this.bars = { latent: cacheBar("latent", "latent cache"), plain: cacheBar("plain", "plain attention") };
    this.cacheNotes = element("div", {});
    byId("cache").append(this.bars.latent.root, this.bars.plain.root, this.cacheNotes);
  }

  setModel(model) {
    this.model = model;
    const ratio = model.cache_bytes_per_token / model.plain_cache_bytes_per_token;
    this.bars.latent.fill.style.setProperty("--share", ratio);
    this.bars.plain.fill.style.setProperty("--share", 1);
    const facts = {
      Name: model.name,
      Parameters: `${short(model.parameters)}, ${short(model.active_parameters)} active per token`,
      Layers: `${model.layers}, ${model.moe_layers.length} of them MoE`,
      Experts: `${count(model.experts)} per layer, ${model.experts_per_token} chosen per token, ${model.shared_experts} shared`,
      Groups: model.groups > 1 ? `${model.groups} of ${model.experts / model.groups} experts` : null,
      Context: `${count(model.context)} tokens`,
      Vocabulary: `${count(model.vocabulary)} tokens`,
      Drafts: model.drafts ? "by the MTP module" : "none: speculative decoding is off",
      Inspector: model.inspector
        ? element("a", { href: "/inspect", target: "_blank" }, "experts, heads and drafts over a text")
        : "fathom inspect makes a page about experts, heads and drafts; fathom serve --inspector links it here",
    };
    const filled = Object.entries(facts).filter(([, value]) => value !== null);
    byId("facts").replaceChildren(
      ...filled.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
    );
  }

  show(now) {
    const { speed, drafts, requests, written } = this.tiles;
    speed.value.textContent = rough(now.tokens_per_second);
    speed.note.textContent = "over the last 5 seconds";
    drafts.value.textContent = now.acceptance === null ? "–" : percent(now.acceptance);
    drafts.note.textContent = now.drafted ? `${count(now.accepted)} of ${count(now.drafted)}` : "none drafted yet";
    requests.value.textContent = count(now.running);
    requests.note.textContent = `${count(now.waiting)} waiting`;
    written.value.textContent = count(now.generated_tokens);
    written.note.textContent = `in ${duration(now.uptime_s)}`;
    this.speeds = [...this.speeds, now.tokens_per_second].slice(-POINTS);
    drawLine(this.line, this.speeds);
    this.showCache(now);
  }

  showCache(now) {
    const { cache_bytes_per_token: latent, plain_cache_bytes_per_token: plain } = this.model;
    const held = now.cached_tokens;
    this.most = Math.max(this.most, held);
    for (const [bar, each] of [[this.bars.latent, latent], [this.bars.plain, plain]]) {
      bar.value.textContent = held ? bytes(held * each) : `${bytes(each)} each`;
    }
    const most = this.most ? ` At most ${count(this.most)} since this page was opened.` : "";
    this.cacheNotes.replaceChildren(
      ...[
        `${held ? count(held) : "No"} tokens held by running requests.${most}`,
        `One token takes ${bytes(latent)}; plain attention with the same heads would take ${bytes(plain)}, ${rough(plain / latent)} times as much.`,
        `${count(now.pages_used)} of ${count(now.pages)} pages in use; ${count(now.pages_reusable)} more hold the prefix cache.`,
      ].map((sentence) => element("p", { class: "quiet" }, sentence)),
    );
  }
}

function tile(name, label) {
  const value = element("span", { class: "value", id: `now-${name}` }, "–");
  const note = element("span", { class: "note" });
  return { value, note, root: element("div", {}, element("dt", {}, label), element("dd", {}, value, note)) };
}

function cacheBar(name, label) {
  const fill = element("span", { class: `bar ${name}`, "aria-hidden": "true" });
  const value = element("span", { class: "share", id: `cache-${name}` });
  return { fill, value, root: element("p", { class: "cache-bar" }, element("span", {}, label), fill, value) };
}

function sparkline() {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 20`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(svg.namespaceURI, "polyline"));
  return svg;
}

function drawLine(svg, speeds) {
  const top = Math.max(1, ...speeds);
  const first = POINTS - speeds.length;
  const points = speeds.map((speed, place) => `${first + place},${(19 - (18 * speed) / top).toFixed(1)}`);
  svg.firstChild.setAttribute("points", points.join(" "));
}

function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${rough(seconds / 3600)} h`;
}
