// The sampling parameters: a form, its summary in one line, and the request's fields.

import { element } from "./elements.js";
import { load, save } from "./storage.js";

// `off`: the value that changes nothing, and is left out of the line that says what is set.
const NUMBERS = [
  { name: "temperature", label: "Temperature", initial: 0.7, off: 1, min: 0, max: 2, step: 0.05, hint: "0: greedy" },
  { name: "top_p", label: "Top-p", initial: 1, off: 1, min: 0.01, max: 1, step: 0.01, hint: "1: no limit" },
  { name: "top_k", label: "Top-k", initial: 0, off: 0, min: 0, step: 1, hint: "0: no limit" },
  { name: "min_p", label: "Min-p", initial: 0, off: 0, min: 0, max: 1, step: 0.01, hint: "0: no limit" },
  { name: "repetition_penalty", label: "Repetition penalty", initial: 1, off: 1, min: 0.05, step: 0.05, hint: "1: none" },
  { name: "presence_penalty", label: "Presence penalty", initial: 0, off: 0, min: -2, max: 2, step: 0.1, hint: "0: none" },
  { name: "frequency_penalty", label: "Frequency penalty", initial: 0, off: 0, min: -2, max: 2, step: 0.1, hint: "0: none" },
  { name: "max_tokens", label: "Max tokens", initial: 256, off: null, min: 1, step: 1, hint: "longest answer" },
  { name: "seed", label: "Seed", initial: "", off: "", min: 0, step: 1, hint: "empty: random" },
];

export class Settings {
  constructor(fields, summary) {
    this.summary = summary;
    this.inputs = Object.fromEntries(NUMBERS.map((field) => [field.name, numberInput(field)]));
    this.stop = element("textarea", { id: "set-stop", rows: 2, spellcheck: "false", "aria-describedby": "hint-stop" });
    const reset = element("button", { type: "button", onclick: () => this.fill({}) }, "Defaults");
    fields.append(
      ...NUMBERS.map((field) => labelled(field.name, field.label, field.hint, this.inputs[field.name])),
      labelled("stop", "Stop strings", "one per line; \\n is a line break", this.stop),
      reset,
    );
    fields.addEventListener("input", () => this.changed());
    this.fill(load("settings", {}));
  }

  fill(values) {
    for (const { name, initial } of NUMBERS) this.inputs[name].value = values[name] ?? initial;
    this.stop.value = values.stop ?? "";
    this.changed();
  }

  changed() {
    const values = Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [name, input.value]));
    save("settings", { ...values, stop: this.stop.value });
    const said = NUMBERS.filter(({ name, off }) => values[name] !== "" && values[name] !== String(off));
    const words = said.map(({ name, label }) => `${label.toLowerCase()} ${values[name]}`);
    if (this.stops().length) words.push(`${this.stops().length} stop string${this.stops().length === 1 ? "" : "s"}`);
    this.summary.textContent = words.join(" · ");
  }

  stops() {
    const texts = this.stop.value.split("\n").filter((line) => line !== "");
    return texts.map((text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  }

  /** Fields of the request. Empty ones are left to the server, what is out of range is for the server to refuse. */
  values() {
    const filled = NUMBERS.filter(({ name }) => this.inputs[name].value !== "");
    const body = Object.fromEntries(filled.map(({ name }) => [name, Number(this.inputs[name].value)]));
    return this.stops().length ? { ...body, stop: this.stops() } : body;
  }
}

function numberInput({ name, min, max, step }) {
  return element("input", { id: `set-${name}`, type: "number", inputmode: "decimal", min, max, step, "aria-describedby": `hint-${name}` });
}

function labelled(name, label, hint, input) {
  return element(
    "div",
    { class: `field field-${name}` },
    element("label", { for: `set-${name}` }, label),
    input,
    element("small", { id: `hint-${name}` }, hint),
  );
}
