// What screen readers announce of an answer: whole sentences, once each, in a live region of their own. The visible
// answer is not a live region, or every token would be announced.

import { byId } from "./elements.js";

const SENTENCE = /^[\s\S]*?(?:[.!?:;]\s|\n)/;
const LONGEST = 200; // characters that wait for the end of a sentence, at most
const KEPT = 10000; // milliseconds until announced sentences are removed, so that nobody finds them while browsing

let waiting = "";
let timer = 0;

function say(text) {
  if (text.trim() === "") return;
  const line = document.createElement("p");
  line.textContent = text;
  byId("spoken").append(line);
}

/** More of an answer. */
export function announce(text) {
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
export function announceEnd(words) {
  say(waiting);
  say(words);
  waiting = "";
  timer = setTimeout(() => byId("spoken").replaceChildren(), KEPT);
}
