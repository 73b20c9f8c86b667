// The token panel: whether a token was drafted, its experts, and the alternatives to it.

import { byId, element, percent, visible } from "./elements.js";
import { HeatMap } from "./heatmap.js";

export class TokenPanel {
  /** `step(by)` selects a neighbour, `close()` selects nothing. */
  constructor({ step, close }) {
    this.root = byId("token");
    this.body = byId("token-body");
    this.steps = this.root.querySelector(".steps");
    this.map = new HeatMap("weights", (layer, expert) => this.sentenceOf(layer, expert));
    byId("token-previous").addEventListener("click", () => step(-1));
    byId("token-next").addEventListener("click", () => step(1));
    byId("token-close").addEventListener("click", close);
  }

  setModel(model) {
    this.model = model;
    this.names = model.moe_layers.map((layer) => `L${layer}`);
  }

  showNothing() {
    this.token = null;
    this.root.classList.remove("open");
    this.steps.hidden = true;
    byId("token-place").textContent = "";
    this.body.replaceChildren(
      element("p", { class: "quiet" }, "Select a token of an answer, by pointer or with the arrow keys."),
    );
  }

  /** `place`: which of the exchange's tokens. */
  show(exchange, place) {
    this.token = exchange.tokens[place];
    this.root.classList.add("open");
    this.steps.hidden = false;
    byId("token-place").textContent = `${place + 1} of ${exchange.tokens.length}`;
    this.body.replaceChildren(
      this.heading(),
      ...this.routing(exchange.ended !== null, place === exchange.tokens.length - 1),
      ...this.alternatives(),
    );
    if (this.token.experts) this.drawMap();
  }

  heading() {
    const { id, text, drafted } = this.token;
    const origin = drafted
      ? "drafted by the MTP module, accepted by the model"
      : "sampled by the model, not an accepted draft";
    return element(
      "p",
      { class: "token-heading" },
      element("code", { class: drafted ? "drafted" : "plain" }, visible(text)),
      element("span", { class: "quiet" }, `id ${id}, ${origin}`),
    );
  }

  alternatives() {
    const { text, logprob, top } = this.token;
    if (!top) return [];
    const rows = top.map((other) => ({ ...other, taken: other.text === text && other.logprob === logprob }));
    if (!rows.some((row) => row.taken)) rows.push({ text, logprob, taken: true });
    return [
      element("h3", {}, "Most likely tokens here"),
      element("ol", { class: "alternatives" }, ...rows.map(alternative)),
    ];
  }

  routing(ended, last) {
    const title = element("h3", {}, "Experts");
    if (!this.token.experts) {
      return [title, element("p", { class: "quiet" }, reasonForNone(ended, last))];
    }
    const table = element("details", {}, element("summary", {}, "As a table"), this.table());
    return [title, this.map.root, table];
  }

  drawMap() {
    const { experts, weights } = this.token;
    const values = experts.map((chosen, layer) => {
      const row = new Array(this.model.experts).fill(0);
      chosen.forEach((expert, place) => (row[expert] = weights[layer][place]));
      return row;
    });
    const label = `Bar chart of ${experts.length} layers: the weight of each expert. The table below says the same.`;
    this.map.show({ values, top: Math.max(...weights.flat()), names: this.names, label });
  }

  table() {
    const { experts, weights } = this.token;
    const rows = experts.map((chosen, layer) => {
      const ranked = chosen.map((expert, place) => ({ expert, weight: weights[layer][place] }));
      ranked.sort((one, other) => other.weight - one.weight);
      const pairs = ranked.map(({ expert, weight }) =>
        element("span", { class: "pair" }, `${expert} `, element("small", {}, weight.toFixed(2))));
      return element("tr", {}, element("th", { scope: "row" }, `Layer ${this.model.moe_layers[layer]}`), element("td", {}, ...pairs));
    });
    const head = element("tr", {}, element("th", { scope: "col" }, "Layer"), element("th", { scope: "col" }, "Experts, each with its weight"));
    return element("table", { id: "token-experts" }, element("thead", {}, head), element("tbody", {}, ...rows));
  }

  sentenceOf(layer, expert) {
    const place = this.token.experts[layer].indexOf(expert);
    const name = `Layer ${this.model.moe_layers[layer]}, expert ${expert}`;
    return place < 0 ? `${name}: not chosen` : `${name}: weight ${this.token.weights[layer][place].toFixed(3)}`;
  }
}

function reasonForNone(ended, last) {
  if (!ended) return "They are shown once the token has been through the model, one step after it was sampled.";
  return last
    ? "The last token has not been through the model: it was sampled, and no forward pass followed."
    : "Not stored: only the newest answers are kept in full.";
}

function alternative({ text, logprob, taken }) {
  const share = Math.exp(logprob);
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--share", share);
  return element(
    "li",
    { class: taken ? "taken" : null },
    element("code", {}, visible(text), ...(taken ? [element("span", { class: "unseen" }, " (chosen)")] : [])),
    bar,
    element("span", { class: "share" }, percent(share)),
  );
}
