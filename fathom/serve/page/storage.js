// What a reload keeps: conversations and settings, in localStorage, within bounds.

// Characters per conversation; browsers grant an origin about five million in all.
const ROOM = 2_000_000;

const written = ({ id, text, drafted }) => ({ id, text, drafted });

// A conversation's older exchanges are kept in less detail: up to which part of the room each form is used.
const FORMS = [
  { upTo: 0.8, of: (exchange) => exchange },
  { upTo: 0.9, of: (exchange) => ({ ...exchange, tokens: exchange.tokens.map(written) }) },
  { upTo: 1, of: (exchange) => ({ ...exchange, tokens: [] }) },
];

export function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`fathom.${name}`)) ?? otherwise;
  } catch {
    return otherwise; // not ours, or from another version
  }
}

export function save(name, value) {
  store(name, JSON.stringify(value));
}

/** Exchanges of one mode, the newest in full, older ones with less, the oldest not at all. */
export function saveExchanges(mode, exchanges) {
  const kept = [];
  let form = 0;
  let used = 0;
  for (const exchange of [...exchanges].reverse()) {
    let content = compact(FORMS[form].of(exchange));
    while (used + content.length > FORMS[form].upTo * ROOM) {
      if (++form === FORMS.length) return store(`conversation.${mode}`, `[${kept}]`);
      content = compact(FORMS[form].of(exchange));
    }
    used += content.length;
    kept.unshift(content);
  }
  store(`conversation.${mode}`, `[${kept}]`);
}

/** The exchanges of a mode; one that was running when the page was closed counts as stopped. */
export function loadExchanges(mode) {
  const exchanges = load(`conversation.${mode}`, []);
  if (!Array.isArray(exchanges)) return [];
  for (const exchange of exchanges) exchange.ended ??= "stopped";
  return exchanges;
}

/** Four decimals are more than the page shows of any weight or probability. */
function compact(value) {
  return JSON.stringify(value, (_, part) => (Number.isInteger(part) || typeof part !== "number" ? part : Number(part.toFixed(4))));
}

function store(name, content) {
  try {
    localStorage.setItem(`fathom.${name}`, content);
  } catch {
    localStorage.removeItem(`fathom.${name}`); // quota exceeded: better nothing than stale data
  }
}
