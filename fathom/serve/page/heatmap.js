// A matrix of layers × experts on a canvas, in the theme's colours: as shades ("load"), or as a bar in each cell
// ("weights"), readable without colour. Pointer and arrow keys show single cells; screen readers get the label and a table
// that the caller puts beside the canvas.

import { element } from "./elements.js";

const LEFT = 30; // row labels
const BELOW = 16; // expert numbers
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class HeatMap {
  /** `describe(row, column)` is the sentence about a cell. */
  constructor(kind, describe) {
    this.kind = kind;
    this.describe = describe;
    this.canvas = element("canvas", { role: "img", tabindex: "0" });
    this.output = element("output", { class: "readout" });
    this.root = element("div", { class: "heatmap" }, this.canvas, this.output);
    this.cell = null;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.setCell(null));
    this.canvas.addEventListener("blur", () => this.setCell(null));
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    new ResizeObserver(() => this.paint()).observe(this.root);
    addEventListener("themechange", () => this.paint());
  }

  /** values: rows × columns, full at `top`; names: of the rows; notes: what stands right of each row, or nothing. */
  show({ values, top, names, notes, label }) {
    Object.assign(this, { values, top, names, notes });
    this.canvas.setAttribute("aria-label", label);
    this.paint();
    this.read();
  }

  layout() {
    const rows = this.values.length;
    const right = this.notes ? 40 : 0;
    const height = rows <= 8 ? 20 : rows <= 16 ? 14 : rows <= 32 ? 9 : 5;
    return { rows, columns: this.values[0].length, height, width: (this.root.clientWidth - LEFT - right) / this.values[0].length };
  }

  paint() {
    if (!this.values?.length || !this.root.clientWidth) return;
    const { rows, columns, height, width } = this.layout();
    const density = devicePixelRatio || 1;
    this.canvas.width = this.root.clientWidth * density;
    this.canvas.height = (rows * height + BELOW) * density;
    this.canvas.style.height = `${rows * height + BELOW}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(density, density);
    pen.font = `11px ${getComputedStyle(this.root).fontFamily}`;
    pen.textBaseline = "middle";
    const colors = colorsOf(this.root);
    for (let row = 0; row < rows; row++) {
      pen.fillStyle = shade(colors.shades, 0);
      if (width < 4) pen.fillRect(LEFT, row * height, columns * width, height); // no seams between narrow cells
      for (let column = 0; column < columns; column++) this.paintCell(pen, row, column, { height, width, colors });
    }
    this.paintLabels(pen, { rows, columns, height, width, colors });
    if (this.cell) this.paintCursor(pen, { height, width, colors });
  }

  paintCell(pen, row, column, { height, width, colors }) {
    const share = Math.min(1, this.values[row][column] / this.top || 0);
    if (share === 0 && width < 4) return;
    const gap = width >= 4 && height >= 6 ? 1 : 0;
    const between = height >= 14 ? 3 : gap; // rows of bars must not run together
    const [x, y, w, h] = [LEFT + column * width, row * height, width - gap, height - between];
    const asBar = this.kind === "weights" && height >= 9;
    pen.fillStyle = shade(colors.shades, asBar ? 0 : share);
    pen.fillRect(x, y, w, h);
    if (asBar && share > 0) {
      const tall = Math.max(3, share * h);
      pen.fillStyle = colors.one;
      pen.fillRect(x, y + h - tall, Math.max(w, 3), tall);
    } else if (this.kind === "weights" && share > 0) {
      pen.fillRect(x, y, Math.max(w, 3), h);
    }
  }

  paintLabels(pen, { rows, columns, height, width, colors }) {
    pen.fillStyle = colors.quiet;
    const every = Math.ceil(12 / height);
    for (let row = 0; row < rows; row += every) {
      const middle = Math.max(6, row * height + height / 2); // half a letter below the edge at least
      pen.textAlign = "left";
      pen.fillText(this.names[row], 0, middle);
      pen.textAlign = "right";
      if (this.notes) pen.fillText(this.notes[row], this.root.clientWidth, middle);
    }
    pen.textAlign = "center";
    const step = 2 ** Math.ceil(Math.log2(Math.max(1, 26 / width)));
    for (let column = 0; column < columns; column += step) {
      pen.fillText(String(column), LEFT + column * width + Math.max(width / 2, 4), rows * height + BELOW / 2 + 1);
    }
  }

  paintCursor(pen, { height, width, colors }) {
    const [row, column] = this.cell;
    pen.strokeStyle = colors.ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(LEFT + column * width - 0.5, row * height - 0.5 + (row === 0 ? 1 : 0), Math.max(width, 3), height);
  }

  point(event) {
    if (!this.values?.length) return;
    const { rows, columns, height, width } = this.layout();
    const row = Math.floor(event.offsetY / height);
    const column = Math.floor((event.offsetX - LEFT) / width);
    this.setCell(row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null);
  }

  walk(event) {
    const step = ARROWS[event.key];
    if (!step || !this.values?.length) return;
    event.preventDefault();
    const { rows, columns } = this.layout();
    const [row, column] = this.cell ?? [-step[0], -step[1]];
    this.setCell([clamp(row + step[0], rows), clamp(column + step[1], columns)]);
  }

  setCell(cell) {
    this.cell = cell;
    this.paint();
    this.read();
  }

  read() {
    const inside = this.cell && this.cell[0] < this.values.length && this.cell[1] < this.values[0].length;
    this.output.textContent = inside ? this.describe(...this.cell) : "";
  }
}

const clamp = (place, length) => Math.min(length - 1, Math.max(0, place));

/** The theme's colours, as [red, green, blue]: only a property such as `color` resolves what a variable stands for. */
function colorsOf(root) {
  const probe = root.appendChild(element("i", { hidden: true }));
  const color = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  };
  const [shades, one, quiet, ink] = [["--heat-none", "--heat-mean", "--heat-most"].map(color), ...["--one", "--quiet", "--ink"].map(color)];
  probe.remove();
  return { shades, one: `rgb(${one})`, quiet: `rgb(${quiet})`, ink: `rgb(${ink})` };
}

/** Between three colours: none, half, all. Lightness falls (or, on dark pages, rises) all the way. */
function shade([none, half, all], share) {
  const [from, to, part] = share < 0.5 ? [none, half, share * 2] : [half, all, share * 2 - 1];
  return `rgb(${from.map((low, channel) => Math.round(low + (to[channel] - low) * part))})`;
}
