// Experts selected together: a matrix on a canvas, a pixel a pair, read out under the pointer and the arrow keys.

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

class Together {
  constructor(root) {
    const experts = FACTS.model.experts;
    this.canvas = element("canvas", { width: experts, height: experts, role: "img", tabindex: "0" });
    this.output = element("output", {});
    this.lists = element("div", {});
    this.cell = null;
    const layers = choice("Router", FACTS.routers.map(({ name }) => name), (router) => this.draw(router));
    const map = element("div", {}, this.canvas, this.output);
    root.append(element("div", { class: "controls" }, layers.root), element("div", { class: "matrix" }, map, this.lists));
    this.canvas.addEventListener("pointermove", (event) => {
      const at = (offset) => Math.min(experts - 1, Math.max(0, Math.floor((offset * experts) / this.canvas.clientWidth)));
      this.show([at(event.offsetY), at(event.offsetX)]);
    });
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
    this.draw(0);
  }

  ratio(one, other) {
    return one === other ? null : this.rows[Math.max(one, other)][Math.min(one, other)];
  }

  draw(router) {
    this.rows = FACTS.routers[router].co_firing;
    const pairs = this.rows.flatMap((row, expert) => row.map((ratio, other) => ({ names: `${other} and ${expert}`, ratio })));
    const known = pairs.filter(({ ratio }) => ratio !== null).sort((one, other) => other.ratio - one.ratio);
    const list = (title, some) => [element("h3", {}, title), element("ol", {}, ...some.map(({ names, ratio }) => element("li", {}, `experts ${names}: ${ratio.toFixed(2)} ×`)))];
    const few = known.slice(-Math.min(6, known.length)).reverse();
    this.lists.replaceChildren(...list("Most often together", known.slice(0, 6)), ...list("Least often together", few));
    this.canvas.setAttribute("aria-label", `${FACTS.routers[router].name}: how often each pair of experts is selected together; the extremes are listed beside`);
    this.paint();
    this.show(this.cell);
  }

  paint() {
    const experts = FACTS.model.experts;
    const pen = this.canvas.getContext("2d");
    const image = pen.createImageData(experts, experts);
    const style = getComputedStyle(document.documentElement);
    const [more, less] = ["--two", "--one"].map((name) => channels(style.getPropertyValue(name)));
    const diagonal = channels(style.getPropertyValue("--rule"));
    for (let i = 0; i < experts * experts; i++) {
      const [row, column] = [Math.floor(i / experts), i % experts];
      const { amount, kind } = shading(this.ratio(row, column), 4);
      const color = row === column ? diagonal : kind === "more" ? more : less;
      image.data.set([...color, row === column ? 255 : Math.round(255 * amount)], 4 * i);
    }
    pen.putImageData(image, 0, 0);
  }

  walk(event) {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    const clamp = (at) => Math.min(FACTS.model.experts - 1, Math.max(0, at));
    this.show(this.cell ? [clamp(this.cell[0] + step[0]), clamp(this.cell[1] + step[1])] : [0, 0]);
  }

  show(cell) {
    this.cell = cell;
    if (!cell) {
      this.output.textContent = "Point at a pair, or use the arrow keys.";
      return;
    }
    const ratio = this.ratio(...cell);
    const words = cell[0] === cell[1] ? "the same expert" : ratio === null ? "never selected" : `${ratio.toFixed(2)} × chance`;
    this.output.textContent = `Experts ${cell[0]} and ${cell[1]}: ${words}`;
  }
}

/** #abc or #aabbcc as three channels. */
function channels(color) {
  const digits = color.trim().slice(1);
  const whole = digits.length === 3 ? [...digits].map((digit) => digit + digit).join("") : digits;
  return [0, 2, 4].map((at) => parseInt(whole.slice(at, at + 2), 16));
}
