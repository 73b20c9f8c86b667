// What a screen reader hears of an answer: whole sentences, once each, from a region of their own. The visible answer is
// no live region, or every token would be announced.

import { byId } from "./elements.js";

const SENTENCE = /^[\s\S]*?(?:[.!?:;]\s|\n)/;
const LONGEST = 200; // characters that wait for the end of a sentence, at most
const KEPT = 10000; // milliseconds until what was said is taken away, so that it is not found by browsing

let waiting = "";
let timer = 0;

function say(text) {
  if (text.trim() === "") return;
  const line = document.createElement("p");
  line.textContent = text;
  byId("spoken").append(line);
}

/** More of an answer. */
export function hear(text) {
  clearTimeout(timer);
  waiting += text;
  for (let match = SENTENCE.exec(waiting); match; match = SENTENCE.exec(waiting)) {
    say(match[0]);
    waiting = waiting.slice(match[0].length);
  }
  if (waiting.length > LONGEST) {
    say(waiting);
    waiting = "";
  }
}

/** The answer is over; `words` says how. */
export function hearEnd(words) {
  say(waiting);
  say(words);
  waiting = "";
  timer = setTimeout(() => byId("spoken").replaceChildren(), KEPT);
}
