// A router's experts: load, bias, its lift for each class, and its most characteristic tokens.

class ExpertTable {
  /** `mark(router, expert)` tints the excerpts by an expert. */
  constructor(root, mark) {
    this.mark = mark;
    this.table = element("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "Table of the experts" });
    const layers = choice("Router", FACTS.routers.map(({ name }) => name), (router) => this.draw(router));
    root.append(element("div", { class: "controls" }, layers.root), this.table);
    this.draw(0);
  }

  draw(router) {
    const { load } = FACTS.routers[router];
    const mean = load.reduce((sum, one) => sum + one, 0) / load.length || 1;
    const names = ["expert", "load ÷ mean", "bias", ...FACTS.classes.map(({ name }) => name), "characteristic tokens"];
    const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
    const rows = load.map((one, expert) => this.row(router, expert, one / mean));
    this.table.replaceChildren(element("table", { class: "expert-rows" }, element("thead", {}, head), element("tbody", {}, ...rows)));
  }

  row(router, expert, ratio) {
    const { bias, class_lift: lifts, telling } = FACTS.routers[router];
    const button = element("button", { type: "button", title: "Tint the text above by this expert", onclick: () => this.mark(router, expert) }, String(expert));
    const cells = lifts[expert].map((lift) => {
      const { amount, kind } = shading(lift, 4);
      return element("td", { class: `lift ${kind}`, style: `--amount: ${amount.toFixed(2)}` }, lift === null ? "–" : lift.toFixed(1));
    });
    const words = telling[expert].map((token) =>
      element("span", { title: `${token.taken} of ${token.seen} occurrences` }, element("code", {}, visible(token.text)), ` ${token.lift.toFixed(1)}`));
    return element("tr", {},
      element("th", { scope: "row" }, button),
      element("td", { class: "number" }, ratio.toFixed(2)),
      element("td", { class: "number" }, bias ? signed(bias[expert]) : "–"),
      ...cells,
      element("td", { class: "telling" }, ...words));
  }
}

const signed = (number) => `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(2)}`;
