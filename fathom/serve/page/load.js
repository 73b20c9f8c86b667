// The load of all experts, layer by layer: since this page was opened (or reset), or since the server started.

import { byId, count, element } from "./elements.js";
import { HeatMap } from "./heatmap.js";

export class LoadPanel {
  constructor() {
    this.overall = false;
    this.map = new HeatMap("load", (layer, expert) => this.sentenceOf(layer, expert));
    this.note = element("p", { class: "quiet", id: "load-note" });
    this.body = element("tbody", {});
    byId("load").append(this.choice(), this.map.root, legend(), this.note, this.table());
    byId("load-reset").addEventListener("click", () => {
      this.base = this.load;
      this.select(false);
    });
  }

  choice() {
    const radio = (value, label) => element(
      "label",
      {},
      element("input", { type: "radio", name: "load-since", value, checked: value === "opened", onchange: () => this.select(value === "start") }),
      element("span", {}, label),
    );
    return element(
      "fieldset",
      { class: "segments" },
      element("legend", { class: "unseen" }, "Tokens counted"),
      radio("opened", "since opened"),
      radio("start", "since the server started"),
    );
  }

  table() {
    const heads = ["Layer", "Busiest", "Least busy", "MaxVio"].map((name) => element("th", { scope: "col" }, name));
    const table = element("table", { id: "load-table" }, element("thead", {}, element("tr", {}, ...heads)), this.body);
    return element("details", {}, element("summary", {}, "As a table"), table);
  }

  select(overall) {
    this.overall = overall;
    for (const radio of document.getElementsByName("load-since")) radio.checked = (radio.value === "start") === overall;
    this.draw();
  }

  setModel(model) {
    this.model = model;
    this.names = model.moe_layers.map((layer) => `L${layer}`);
  }

  show({ load }) {
    if (load.length === 0) return;
    this.load = load;
    // A server that was started again counts from zero.
    if (!this.base || load.some((row, layer) => row.some((tokens, expert) => tokens < this.base[layer][expert]))) this.base = load;
    this.draw();
  }

  draw() {
    if (!this.load) return;
    this.counted = this.load.map((row, layer) => row.map((tokens, expert) => tokens - (this.overall ? 0 : this.base[layer][expert])));
    this.means = this.counted.map((row) => row.reduce((sum, tokens) => sum + tokens, 0) / row.length);
    const violations = this.counted.map((row, layer) => (this.means[layer] ? Math.max(...row) / this.means[layer] - 1 : 0));
    const routed = Math.round((this.means[0] * this.model.experts) / this.model.experts_per_token);
    this.map.show({
      values: this.counted.map((row, layer) => row.map((tokens) => (this.means[layer] ? tokens / this.means[layer] : 0))),
      top: 2, // twice the mean: the darkest shade
      names: this.names,
      notes: violations.map((share) => (routed ? `+${Math.round(100 * share)}%` : "")),
      label: `Heat map of ${this.counted.length} layers by ${this.model.experts} experts: each expert's load. The table below sums it up.`,
    });
    this.note.textContent = routed
      ? `${count(routed)} tokens, ${this.model.experts_per_token} experts each per layer. Right: MaxVio, how far the busiest expert is above the mean.`
      : "No tokens yet.";
    this.fillTable(violations);
  }

  fillTable(violations) {
    const cells = (row, layer) => {
      const [most, least] = [Math.max(...row), Math.min(...row)];
      return [`expert ${row.indexOf(most)}: ${count(most)}`, `expert ${row.indexOf(least)}: ${count(least)}`, violations[layer].toFixed(2)];
    };
    this.body.replaceChildren(...this.counted.map((row, layer) => element(
      "tr",
      {},
      element("th", { scope: "row" }, String(this.model.moe_layers[layer])),
      ...cells(row, layer).map((text) => element("td", {}, text)),
    )));
  }

  sentenceOf(layer, expert) {
    const tokens = this.counted[layer][expert];
    const times = this.means[layer] ? `, ${(tokens / this.means[layer]).toFixed(2)} times the mean` : "";
    return `Layer ${this.model.moe_layers[layer]}, expert ${expert}: ${count(tokens)} tokens${times}`;
  }
}

function legend() {
  return element(
    "p",
    { class: "legend", "aria-hidden": "true" },
    element("span", {}, "none"),
    element("span", { class: "ramp" }),
    element("span", {}, "2× mean"),
  );
}
