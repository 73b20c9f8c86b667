// Making elements, and figures as people read them. Text always goes in as text nodes: nothing is parsed as markup.

const FACTS = JSON.parse(document.getElementById("facts").textContent);
const byId = (id) => document.getElementById(id);

/** element("p", { class: "quiet" }, "text", child): properties are attributes, `on…` functions are listeners. */
function element(name, properties = {}, ...children) {
  return filled(document.createElement(name), properties, children);
}

/** The same in SVG. */
function drawn(name, properties = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), properties, children);
}

function filled(made, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** A labelled choice; `chosen(place)` hears of it. */
function choice(label, names, chosen) {
  const select = element("select", { onchange: () => chosen(select.selectedIndex) });
  select.append(...names.map((name) => element("option", {}, name)));
  return { root: element("label", {}, label, select), select };
}

/** A token with its blanks made visible, such as ␣def↵, and many of them counted: ␣×12 */
function visible(text) {
  if (text === "") return "∅";
  const signs = { "\n": "↵", "\t": "⇥" };
  const blanks = (run) => (run.length < 4 ? "␣".repeat(run.length) : `␣×${run.length}·`);
  const control = (c) => signs[c] ?? `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`;
  return text.replace(/ +/g, blanks).replace(/[\x00-\x1f\x7f]/g, control).replace(/·$/, "");
}

const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1%" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`);

/** How strongly to colour times the average: all at `full` times as many, or as few. */
function shading(lift, full) {
  if (lift === null) return { amount: 0, kind: "none" };
  const amount = lift > 0 ? Math.min(1, Math.abs(Math.log2(lift)) / Math.log2(full)) : 1;
  return { amount, kind: lift > 1 ? "more" : "less" };
}

/** A row of cells of which some have a bar: [place, share of the height from 0 to 1]. */
function strip(cells, bars, label) {
  const wide = Math.max(1, cells / 150); // a bar of a long row must still be seen
  const rects = bars.map(([place, share]) => {
    const height = Math.max(0.08, share);
    return drawn("rect", { x: Math.min(place, cells - wide), y: 1 - height, width: wide, height });
  });
  return drawn("svg", { class: "strip", viewBox: `0 0 ${cells} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...rects);
}
