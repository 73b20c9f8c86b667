// Light or dark: the system's preference unless the button overrides it. Runs before the first paint.

import { load, save } from "./storage.js";

const CHOICES = ["auto", "light", "dark"];
const LABELS = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
const SIGNS = { auto: "◐", light: "☀", dark: "☾" };

function chosen() {
  const stored = load("theme", "auto");
  return CHOICES.includes(stored) ? stored : "auto";
}

function apply(choice) {
  if (choice === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
}

/** Let a button go through the three choices. */
export function bindTheme(button) {
  const label = () => {
    button.textContent = SIGNS[chosen()];
    button.title = LABELS[chosen()];
    button.setAttribute("aria-label", LABELS[chosen()]);
  };
  button.addEventListener("click", () => {
    save("theme", CHOICES[(CHOICES.indexOf(chosen()) + 1) % CHOICES.length]);
    apply(chosen());
    label();
    dispatchEvent(new Event("themechange"));
  });
  // Canvases are painted with the theme's colours and must be painted again when the system changes it.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("themechange")));
  label();
}

apply(chosen());
