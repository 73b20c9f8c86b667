// The visible conversation: exchanges with their tokens, the selected token, and navigation between tokens.

import { count, element, percent, rough } from "./elements.js";

const ENDINGS = { length: "max tokens reached", stopped: "stopped", content_filter: "filtered" };
const NEAR = 60; // pixels from the end that still count as reading the end

export class Transcript {
  /** `selected(exchange, place)` on every selection, null for none; `retry()` answers the last exchange again. */
  constructor(root, scroll, { selected, retry }) {
    Object.assign(this, { root, scroll, selected, retry });
    this.views = [];
    this.selection = null;
    this.following = true;
    scroll.addEventListener("scroll", () => {
      this.following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;
    });
  }

  show(mode, exchanges) {
    this.mode = mode;
    this.views = [];
    this.root.replaceChildren();
    this.select(null);
    for (const exchange of exchanges) {
      this.add(exchange);
      if (exchange.ended) this.finish(exchange);
    }
  }

  /** A new exchange at the end. */
  add(exchange) {
    const view = { exchange, answer: this.answerOf(exchange), footer: element("footer", {}), spans: [] };
    const said = this.mode === "chat" ? [element("h3", { class: "unseen" }, "You"), element("p", { class: "said" }, exchange.prompt)] : [];
    const heading = element("h3", { class: "unseen" }, this.mode === "chat" ? "Model" : "Text and its completion");
    this.root.append(element("article", { class: `exchange ${this.mode}` }, ...said, heading, view.answer, view.footer));
    this.views.at(-1)?.footer.querySelector(".retry")?.remove();
    this.views.push(view);
    if (exchange.tokens.length) this.grow(exchange, exchange.tokens);
    else view.answer.append(exchange.text);
    this.following = true;
    this.follow();
  }

  answerOf(exchange) {
    const answer = element("div", { class: "answer running", role: "group", tabindex: "0", "aria-label": "Answer; arrow keys move between its tokens" });
    if (this.mode === "completion") answer.append(element("span", { class: "given" }, exchange.prompt));
    answer.addEventListener("click", (event) => this.clicked(event, exchange));
    answer.addEventListener("keydown", (event) => this.pressed(event, exchange));
    return answer;
  }

  /** Tokens that came. */
  grow(exchange, tokens) {
    const view = this.viewOf(exchange);
    const spans = tokens.map(({ text, drafted }) =>
      element("span", { class: `token${drafted ? " drafted" : ""}${text.includes("\n") ? " break" : ""}` }, text));
    view.spans.push(...spans);
    view.answer.append(...spans);
    if (this.selection?.exchange === exchange) this.selected(this.selection);
    this.follow();
  }

  /** The exchange is over: say how it went. */
  finish(exchange) {
    const view = this.viewOf(exchange);
    view.answer.classList.remove("running");
    const words = summary(exchange);
    if (exchange.error) view.footer.append(element("p", { class: "error", role: "alert" }, exchange.error));
    if (words.length) view.footer.append(element("p", { class: "quiet" }, ...words));
    if (view === this.views.at(-1)) {
      view.footer.append(element("button", { type: "button", class: "retry", onclick: () => this.retry() }, "Retry"));
    }
    if (this.selection?.exchange === exchange) this.selected(this.selection);
    this.follow();
  }

  /** Take the last exchange away. */
  drop() {
    const view = this.views.pop();
    if (this.selection?.exchange === view.exchange) this.select(null);
    this.root.lastChild.remove();
  }

  viewOf(exchange) {
    return this.views.find((view) => view.exchange === exchange);
  }

  select(selection) {
    if (this.selection) this.spanOf(this.selection)?.classList.remove("selected");
    this.selection = selection;
    this.selected(selection);
    if (!selection) return;
    this.spanOf(selection).classList.add("selected");
    this.spanOf(selection).scrollIntoView({ block: "nearest" });
  }

  spanOf({ exchange, place }) {
    return this.viewOf(exchange)?.spans[place];
  }

  /** To a neighbour of the selected token. */
  step(by) {
    const { exchange, place } = this.selection;
    this.select({ exchange, place: within(place + by, exchange.tokens.length) });
  }

  clicked(event, exchange) {
    const place = this.viewOf(exchange).spans.indexOf(event.target);
    // A click that selects text is not meant for the token under the last letter.
    if (place >= 0 && getSelection().isCollapsed) this.select({ exchange, place });
  }

  pressed(event, exchange) {
    const { spans } = this.viewOf(exchange);
    if (!spans.length || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const here = this.selection?.exchange === exchange ? this.selection.place : null;
    const goes = {
      ArrowLeft: () => (here === null ? spans.length - 1 : here - 1),
      ArrowRight: () => (here === null ? 0 : here + 1),
      ArrowUp: () => (here === null ? spans.length - 1 : onNextLine(spans, here, -1)),
      ArrowDown: () => (here === null ? 0 : onNextLine(spans, here, 1)),
      Home: () => 0,
      End: () => spans.length - 1,
    };
    if (!(event.key in goes)) return;
    event.preventDefault();
    this.select({ exchange, place: within(goes[event.key](), spans.length) });
  }

  follow() {
    if (!this.following || this.scheduled) return;
    this.scheduled = requestAnimationFrame(() => {
      this.scheduled = 0;
      this.scroll.scrollTop = this.scroll.scrollHeight;
    });
  }
}

const within = (place, length) => Math.min(length - 1, Math.max(0, place));

/** The token nearest in the line above (direction −1) or below (1); where there is none, the same token. */
function onNextLine(spans, from, direction) {
  const middle = (box) => (box.left + box.right) / 2;
  const start = spans[from].getClientRects()[0];
  let best = null;
  for (let place = from + direction; start && place >= 0 && place < spans.length; place += direction) {
    const box = spans[place].getClientRects()[0];
    if (!box || Math.abs(box.top - start.top) < start.height / 2) continue;
    if (best && Math.abs(box.top - best.top) > start.height / 2) break;
    const distance = Math.abs(middle(box) - middle(start));
    if (!best || distance < best.distance) best = { place, distance, top: box.top };
  }
  return best ? best.place : from;
}

/** How an answer went: pieces with dots between them. */
function summary({ tokens, timing, ended }) {
  const pieces = [];
  if (tokens.length) pieces.push([`${count(tokens.length)} token${tokens.length === 1 ? "" : "s"}`]);
  const drafted = tokens.filter((token) => token.drafted).length;
  if (drafted) {
    const sample = element("span", { class: "drafted" }, `${count(drafted)} drafted and accepted`);
    pieces.push([sample, ` (${percent(drafted / tokens.length)})`]);
  }
  if (timing) {
    pieces.push([`${rough(timing.tokens_per_second)} tokens/s`], [`${rough(timing.tokens_per_forward)} tokens per forward pass`]);
    pieces.push([`first after ${rough(timing.first_token_s)} s`]);
  }
  if (ended in ENDINGS) pieces.push([ENDINGS[ended]]);
  return pieces.flatMap((piece, place) => [place ? " · " : "", element("span", {}, ...piece)]);
}
