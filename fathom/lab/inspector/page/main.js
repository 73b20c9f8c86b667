// Brings the parts together: what is selected, and by what the text is tinted.

const tinted = { router: null, expert: null, attention: null };
const key = element("p", { class: "quiet", id: "tint-words" });
const excerpts = new Excerpts(byId("excerpts"), (excerpt, at) => panel.show(excerpt, at));
const panel = new TokenPanel(byId("panel"), {
  step: (by) => excerpts.step(by),
  attend: (weights) => { tinted.attention = weights; tint(); },
});

function tint() {
  if (tinted.attention) {
    key.textContent = "Blue: how much the chosen head attends to it, shaded by the root of the weight. ";
    excerpts.tint("attention", (_, at, number) => (number === excerpts.now.number ? Math.sqrt(tinted.attention.get(at) ?? 0) : 0));
  } else if (tinted.router !== null) {
    key.textContent = `Blue: the token is routed to expert ${tinted.expert} of ${FACTS.routers[tinted.router].name}. `;
    excerpts.tint("expert", (token) => (token.experts[tinted.router]?.includes(tinted.expert) ? 1 : 0));
    key.append(element("button", { type: "button", onclick: () => { tinted.router = null; tint(); } }, "Show surprise again"));
  } else {
    key.textContent = "Orange: how surprising the token was, from 0 to 12 bits. ";
    excerpts.tint("surprise", ({ bits }) => Math.min(1, (bits ?? 0) / 12));
  }
}

byId("tint").append(key);
if (byId("expert-table")) {
  new ExpertTable(byId("expert-table"), (router, expert) => {
    Object.assign(tinted, { router, expert });
    panel.head = null;
    if (excerpts.now) excerpts.step(0);
    else tint();
    byId("tokens").scrollIntoView();
  });
}
if (byId("together-map")) new Together(byId("together-map"));
tint();
excerpts.select(0, Math.min(1, FACTS.excerpts[0].tokens.length - 1));
