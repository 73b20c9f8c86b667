// Creates elements and formats numbers. Text is always inserted as text nodes: nothing is parsed as markup.

/** element("p", { class: "quiet" }, "text", child): properties are attributes, `on…` functions are listeners. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** 12,345 */
export const count = (number) => whole.format(number);

/** Three digits and a unit, in powers of 1,000. */
function scaled(number, units) {
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(number, 1)) / 3)));
  return `${power === 0 ? count(number) : Number((number / 1000 ** power).toPrecision(3))}${units[power]}`;
}

/** 5.1M */
export const short = (number) => scaled(number, ["", "K", "M", "B", "T"]);

/** 640 B, 12.3 KB */
export const bytes = (number) => scaled(number, [" B", " KB", " MB", " GB", " TB"]);

/** 83.1%, or below a thousandth: < 0.1% */
export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1%";
  return `${(100 * share).toFixed(share >= 0.9995 ? 0 : 1)}%`;
}

/** Three digits at most say something: 3.14, 31.4, 314; 4 and not 4.00. */
export const rough = (number) => (number >= 100 ? count(number) : String(Number(number.toPrecision(3))));

/** A token's text with its blanks made visible, such as ␣def↵ */
export function visible(text) {
  if (text === "") return "∅";
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}
