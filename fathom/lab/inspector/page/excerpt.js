// The excerpts: tokens that can be selected by pointer and by keyboard, tinted by what the reader wants to see.

class Excerpts {
  /** `selected(excerpt, at)` is called with the selected token. */
  constructor(root, selected) {
    this.selected = selected;
    this.excerpts = FACTS.excerpts.map((facts, number) => ({ facts, number, box: this.box(facts, number) }));
    for (const { facts, box } of this.excerpts) {
      const last = facts.start + facts.tokens.length - 2;
      root.append(element("h3", {}, `Tokens ${facts.start.toLocaleString("en")} to ${last.toLocaleString("en")}`), box);
    }
    this.now = null;
  }

  box(facts, number) {
    const spans = facts.tokens.map((token, at) => this.span(token, number, at));
    const box = element("div", { class: "excerpt", role: "listbox", tabindex: "0", "aria-label": `Tokens from ${facts.start}` }, ...spans);
    box.addEventListener("keydown", (event) => this.walk(event, number));
    box.addEventListener("click", (event) => {
      const span = event.target.closest(".token");
      if (span) this.select(number, [...box.children].indexOf(span));
    });
    return box;
  }

  span(token, number, at) {
    const span = element("span", { class: "token", role: "option", id: `t${number}-${at}`, "aria-selected": "false" });
    if (at === 0) span.append(element("span", { class: "sign" }, "⟨BOS⟩\n"));
    // A line break is shown, so that it can be selected, and breaks the line.
    else for (const part of token.text.split(/(\n)/)) span.append(part === "\n" ? element("span", { class: "sign" }, "↵\n") : printable(part));
    return span;
  }

  select(number, at) {
    const { facts, box } = this.excerpts[number];
    const inside = Math.min(facts.tokens.length - 1, Math.max(0, at));
    if (this.now) this.spanOf(this.now).setAttribute("aria-selected", "false");
    this.now = { number, at: inside };
    const span = this.spanOf(this.now);
    span.setAttribute("aria-selected", "true");
    box.setAttribute("aria-activedescendant", span.id);
    reveal(box, span);
    this.selected(facts, inside);
  }

  step(by) {
    if (this.now) this.select(this.now.number, this.now.at + by);
  }

  spanOf({ number, at }) {
    return this.excerpts[number].box.children[at];
  }

  walk(event, number) {
    const at = this.now?.number === number ? this.now.at : -1;
    const last = this.excerpts[number].facts.tokens.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key] ?? this.line(event.key, number, at);
    if (to === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.select(number, to);
  }

  /** The token above or below: the nearest on the next line of the screen. */
  line(key, number, at) {
    const by = { ArrowUp: -1, ArrowDown: 1 }[key];
    if (!by) return null;
    const spans = this.excerpts[number].box.children;
    if (at < 0) return 0;
    const from = spans[at].getClientRects()[0];
    let best = null;
    for (let i = at + by; i >= 0 && i < spans.length; i += by) {
      const rect = spans[i].getClientRects()[0];
      if (Math.abs(rect.top - from.top) < 4) continue;
      if (best && Math.abs(rect.top - best.top) > 4) break;
      const distance = Math.abs(rect.left - from.left);
      if (!best || distance < best.distance) best = { top: rect.top, distance, i };
    }
    return best ? best.i : at;
  }

  /** amountOf(token, at, excerpt number): from 0 to 1. */
  tint(kind, amountOf) {
    for (const { facts, number, box } of this.excerpts) {
      box.classList.remove("surprise", "attention", "expert");
      box.classList.add(kind);
      facts.tokens.forEach((token, at) => box.children[at].style.setProperty("--amount", amountOf(token, at, number).toFixed(3)));
    }
  }
}

const printable = (text) => text.replace(/[\x00-\x08\x0b-\x1f\x7f]/g, (c) => visible(c));

/** Scroll the box, never the page. */
function reveal(box, span) {
  const [inner, outer] = [span.getClientRects()[0], box.getBoundingClientRect()];
  if (inner.top < outer.top + 8) box.scrollTop -= outer.top - inner.top + 40;
  else if (inner.bottom > outer.bottom - 8) box.scrollTop += inner.bottom - outer.bottom + 40;
}
