// The requests of the two modes, and their chunks in one common form.
//
// An exchange: { prompt, text, tokens, ended, timing, error }
//   tokens: [{ id, text, drafted, logprob, top: [{ text, logprob }], experts, weights }]
//     experts, weights: MoE layers × chosen experts, of the forward pass over this token (absent before it)
//   ended: "stop" | "length" | "stopped" (by the user) | "error", or null while it runs

const ALTERNATIVES = 5;
const FACTS = { routing: true, drafts: true, timing: true };

export const newExchange = (prompt) => ({ prompt, text: "", tokens: [], ended: null, timing: null, error: null });

/** Path and body of the request that answers the last of the exchanges. */
export function requestFor(mode, exchanges, sampling, model) {
  const shared = { model, stream: true, fathom: FACTS, ...sampling };
  if (mode === "completion") {
    const { prompt } = exchanges.at(-1);
    return { path: "/v1/completions", body: { ...shared, prompt, logprobs: ALTERNATIVES } };
  }
  const messages = exchanges.flatMap(({ prompt, text }, place) => {
    const said = { role: "user", content: prompt };
    return place === exchanges.length - 1 ? [said] : [said, { role: "assistant", content: text }];
  });
  return { path: "/v1/chat/completions", body: { ...shared, messages, logprobs: true, top_logprobs: ALTERNATIVES } };
}

/** Add a chunk to its exchange; returns the tokens that are new. */
export function take(mode, exchange, chunk) {
  if (chunk.fathom?.timing) exchange.timing = chunk.fathom.timing;
  const [choice] = chunk.choices;
  if (!choice) return [];
  const facts = mode === "chat" ? chatLogprobs(choice.logprobs) : completionLogprobs(choice.logprobs);
  const fresh = (choice.fathom?.tokens ?? []).map((token, place) => ({ ...token, ...facts[place] }));
  exchange.text += (mode === "chat" ? choice.delta.content : choice.text) ?? "";
  exchange.tokens.push(...fresh);
  for (const { index, experts, weights } of choice.fathom?.routing ?? []) {
    if (index < exchange.tokens.length) Object.assign(exchange.tokens[index], { experts, weights });
  }
  if (choice.finish_reason) exchange.ended = choice.finish_reason;
  return fresh;
}

function chatLogprobs(logprobs) {
  return (logprobs?.content ?? []).map(({ logprob, top_logprobs }) => ({
    logprob,
    top: top_logprobs.map(({ token, logprob }) => ({ text: token, logprob })),
  }));
}

function completionLogprobs(logprobs) {
  return (logprobs?.token_logprobs ?? []).map((logprob, place) => ({
    logprob,
    top: Object.entries(logprobs.top_logprobs[place])
      .map(([text, logprob]) => ({ text, logprob }))
      .sort((one, other) => other.logprob - one.logprob)
      .slice(0, ALTERNATIVES),
  }));
}
