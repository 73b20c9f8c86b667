// The panel: one token, its experts, what its heads attended to.

class TokenPanel {
  /** `step(by)` selects a neighbour; `attend(weights)` tints the excerpt by place → weight. */
  constructor(root, { step, attend }) {
    Object.assign(this, { root, step, attend, layer: FACTS.model.layers - 1, head: null });
    root.append(element("p", { class: "quiet" }, "Select a token."));
  }

  show(excerpt, at) {
    Object.assign(this, { excerpt, at, token: excerpt.tokens[at] });
    const heads = element("div", {});
    this.root.replaceChildren(this.heading(), ...this.prediction(), ...this.experts(), ...this.attention(heads));
    this.drawHeads(heads);
  }

  heading() {
    const button = (sign, name, by) => element("button", { type: "button", "aria-label": name, onclick: () => this.step(by) }, sign);
    const name = this.at === 0 ? "BOS" : `token ${excerptPlace(this.excerpt, this.at)}, ${FACTS.classes[this.token.kind].name}`;
    const words = element("p", { id: "panel-token" }, element("code", {}, this.at === 0 ? "⟨BOS⟩" : visible(this.token.text)), ` ${name}`);
    return element("header", {}, words, button("←", "Previous token", -1), button("→", "Next token", 1));
  }

  prediction() {
    if (this.token.bits === null) return [];
    const { bits, choice, drafts } = this.token;
    const first = choice.agrees ? ["; the model’s most likely token."] : ["; the model’s most likely token: ", element("code", {}, visible(choice.text)), ` ${percent(choice.p)}.`];
    const lines = [element("p", {}, `Probability ${percent(2 ** -bits)}, ${bits.toFixed(1)} bits`, ...first)];
    drafts.forEach((draft, k) => {
      if (draft === null) return;
      const verdict = draft.agrees ? "accepted: also the model’s most likely token." : "rejected: not the model’s most likely token.";
      lines.push(element("p", {}, `Draft of module ${k + 1}: `, element("code", {}, visible(draft.text)), ` ${percent(draft.p)}, ${verdict}`));
    });
    return lines;
  }

  experts() {
    if (!FACTS.routers.length) return [];
    const { experts, weights } = this.token;
    const top = Math.max(...weights.filter(Boolean).flat());
    const rows = FACTS.routers.map(({ name }, router) => {
      const head = element("th", { scope: "row" }, name.replace("module ", ""));
      if (!experts[router]) return element("tr", {}, head, element("td", { colspan: "2", class: "quiet" }, "not processed"));
      const pairs = experts[router].map((expert, i) =>
        element("span", { class: "pair" }, `${expert} `, element("small", {}, weights[router][i].toFixed(2))));
      const bars = experts[router].map((expert, i) => [expert, weights[router][i] / top]);
      const label = `${name}: the weights of its experts, as listed beside`;
      return element("tr", {}, head, element("td", {}, strip(FACTS.model.experts, bars, label)), element("td", {}, ...pairs));
    });
    return [element("h3", {}, "Experts, with their weights"), element("table", { class: "routes" }, element("tbody", {}, ...rows))];
  }

  attention(heads) {
    const title = element("h3", {}, "Attention of its heads");
    if (!this.token.attention) {
      return [title, element("p", { class: "quiet" }, this.at === 0 ? "Itself only: it is the first token." : `Kept for every ${FACTS.attention.every}th token only.`)];
    }
    const names = this.token.attention.map((_, layer) => `layer ${layer}`);
    const layers = choice("Layer", names, (layer) => { this.layer = layer; this.drawHeads(heads); });
    layers.select.selectedIndex = this.layer;
    return [title, element("div", { class: "controls" }, layers.root), heads];
  }

  drawHeads(root) {
    if (!this.token.attention) return this.attend(null);
    const layer = this.token.attention[this.layer];
    const mean = new Map();
    layer.forEach((pairs) => eachPair(pairs, (key, weight) => mean.set(key, (mean.get(key) ?? 0) + weight / layer.length)));
    const maps = [mean, ...layer.map((pairs) => { const map = new Map(); eachPair(pairs, (key, weight) => map.set(key, weight)); return map; })];
    if (this.head !== null && this.head >= maps.length) this.head = null;
    const rows = maps.map((map, at) => this.headRow(map, at, () => { this.head = this.head === at ? null : at; this.drawHeads(root); byId(`head-${at}`).focus(); }));
    root.replaceChildren(element("table", { class: "heads" }, element("tbody", {}, ...rows)),
      element("p", { class: "quiet" }, "A strip runs from BOS to this token. A head’s button tints the text by its weights."));
    this.attend(this.head === null ? null : maps[this.head]);
  }

  headRow(map, at, press) {
    const name = at === 0 ? "all" : `head ${at - 1}`;
    const button = element("button", { type: "button", id: `head-${at}`, "aria-pressed": String(this.head === at), onclick: press }, name);
    const strongest = [...map].sort((one, other) => other[1] - one[1]).slice(0, 3);
    const words = strongest.map(([key, weight]) =>
      element("span", { class: "pair" }, element("code", {}, keyName(this.excerpt, key, this.at)), ` ${percent(weight)}`));
    const bars = strip(this.at + 1, [...map], `${name}: weights over the tokens so far, the strongest listed beside`);
    return element("tr", {}, element("td", {}, button), element("td", {}, bars), element("td", {}, ...words));
  }
}

function eachPair(pairs, take) {
  for (let i = 0; i < pairs.length; i += 2) take(pairs[i], pairs[i + 1] / 1000);
}

function keyName(excerpt, key, at) {
  if (key === 0) return "⟨BOS⟩";
  return key === at ? "itself" : visible(excerpt.tokens[key].text);
}

const excerptPlace = (excerpt, at) => (excerpt.start + at - 1).toLocaleString("en");
