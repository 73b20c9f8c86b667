// Asks for the API key, one question at a time.

import { setKey } from "./api.js";
import { byId } from "./elements.js";

let open = null;

/** Resolves to whether a key was given. */
export function askForKey(reason) {
  open ??= ask(reason).finally(() => (open = null));
  return open;
}

async function ask(reason) {
  const dialog = byId("key");
  const field = byId("key-value");
  byId("key-title").textContent = reason;
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((done) => {
    byId("key-cancel").onclick = () => dialog.close();
    dialog.addEventListener("close", done, { once: true });
  });
  const given = dialog.returnValue === "given";
  if (given) setKey(field.value.trim());
  field.value = "";
  return given;
}
