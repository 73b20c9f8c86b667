"""The sections of the inspector's page as HTML; their interactive parts are added by the scripts."""

import re
from html import escape

from fathom.lab.inspector.facts import Facts, LatentFacts
from fathom.lab.inspector.picture import load_and_bias, spectrum
from fathom.lab.inspector.prediction import DraftFacts, FailedDraft


def tokens(facts: Facts) -> str:
    """Containers of the excerpts and the panel."""
    shown = sum(len(excerpt["tokens"]) - 1 for excerpt in facts["excerpts"])
    return (
        f"<p>{shown:,} of the {facts['text']['tokens']:,} tokens, in {len(facts['excerpts'])} "
        f"{'excerpts' if len(facts['excerpts']) > 1 else 'excerpt'} spread over the text. Select a token, by "
        "pointer or with the arrow keys, to see its probability, its experts in each layer, and what each head "
        "attended to.</p>"
        '<div id="workbench"><div><div id="tint"></div><div id="excerpts"></div></div>'
        '<aside id="panel" aria-label="The selected token"></aside></div>'
    )


def experts(facts: Facts) -> str:
    """Classes and experts; the table of experts is drawn by script."""
    if not facts["routers"]:
        return "<p>This model has no MoE layers, so there are no experts to compare.</p>"
    rule = "Python’s own tokenizer" if facts["text"]["rule"] == "python" else "a lexical rule"
    rows = "".join(
        f'<tr><th scope="row">{one["name"]}</th><td>{one["tokens"]:,}</td>'
        f"<td>{_number(one['bits_per_token'])}</td></tr>"
        for one in facts["classes"]
    )
    return (
        f"<p>Tokens are classified by {rule}. A cell is the lift: how often tokens of the class are routed to the "
        "expert, relative to all tokens; 1 is average, 2 is twice as often. Characteristic tokens have the highest "
        "lift, smoothed, among those that occur at least three times.</p>"
        '<div id="expert-table"></div>'
        f'<details><summary>The classes, and how well each is predicted</summary><table class="numbers"><thead><tr>'
        f'<th scope="col">class</th><th scope="col">tokens</th><th scope="col">bits per token</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></details>"
    )


def load(facts: Facts) -> str:
    """A picture per router."""
    if not facts["routers"]:
        return "<p>There is nothing to balance: the model has no MoE layers.</p>"
    return (
        "<p>Blue bars: tokens routed to each expert; the dotted line is the mean. Orange bars: the correction bias "
        "that balances the loads in training; it affects which experts are selected, never their weights (DeepSeek-V3 "
        "report, 2.1.2). MaxVio is the load of the busiest expert over the mean, minus 1. A single text uses some "
        "experts more than others, so 0 is not to be expected.</p>"
        f'<div class="strips">{"".join(map(load_and_bias, facts["routers"]))}</div>'
    )


def together(facts: Facts) -> str:
    """Container of the matrix."""
    if not facts["routers"]:
        return "<p>No experts, no pairs.</p>"
    if facts["model"]["experts_per_token"] == 1:
        return "<p>Each token is routed to one expert, so there are no pairs.</p>"
    return (
        "<p>How often two experts are selected for the same token, relative to as many pairs drawn in "
        "proportion to both experts’ loads. Orange: more often; blue: less often.</p>"
        '<div id="together-map"></div>'
    )


def latents(facts: Facts) -> str:
    """A row per layer."""
    rank, rope = facts["model"]["latent_rank"], facts["model"]["rope_width"]
    rows = "".join(map(_latent_row, facts["latents"]))
    columns = (
        "layer",
        "singular values",
        "99 % in",
        "participation",
        "entropy",
        "99 % in, centred",
        "participation, centred",
    )
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f"<p>Each layer caches a normalised latent of {rank} elements per token (and a rotary key of {rope}). "
        "The singular values of the matrix of all these latents show how many dimensions are used: how many hold 99 % "
        "of the energy (squared singular values), and two softer counts, (Σe)²/Σe² and the exponential of the entropy "
        "of their shares. «Centred» is the same after subtracting the mean latent.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of the latents">'
        f'<table class="numbers latents">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _latent_row(layer: LatentFacts) -> str:
    numbers = [
        str(layer["dimensions_99"]),
        f"{layer['participation']:.1f}",
        f"{layer['entropy']:.1f}",
        str(layer["centred_dimensions_99"]),
        f"{layer['centred_participation']:.1f}",
    ]
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    return f'<tr><th scope="row">{layer["layer"]}</th><td>{spectrum(layer["singular_values"])}</td>{cells}</tr>'


def drafts(facts: Facts) -> str:
    """Two tables per MTP module."""
    if not facts["drafts"]:
        return "<p>This model has no multi-token-prediction module, so there are no drafts.</p>"
    introduction = (
        "<p>An MTP module predicts each token one step before the main head. Greedy decoding accepts this draft where "
        "it is the model’s most likely token; whether it is also the text’s token is counted separately. Both are "
        "measured with teacher forcing on the text itself.</p>"
    )
    return introduction + "".join(map(_module, facts["drafts"]))


def _module(draft: DraftFacts) -> str:
    rows = [(one["name"], one["drafts"], one["agree"], one["right"]) for one in draft["classes"] if one["drafts"]]
    rows.append(("all", draft["drafts"], draft["agree"], draft["right"]))
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{drafts:,}</td><td>{_share(agree)}</td><td>{_share(right)}</td></tr>'
        for name, drafts, agree, right in rows
    )
    failed = "".join(map(_failed, draft["failed"]))
    columns = ("place", "before", "model’s choice", "draft", "missed by")
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f'<table class="numbers drafts"><caption>Module {draft["module"]}, by class of the drafted token</caption>'
        '<thead><tr><th scope="col">class</th><th scope="col">drafts</th><th scope="col">agree with the model</th>'
        f'<th scope="col">are the text’s token</th></tr></thead><tbody>{body}</tbody></table>'
        "<p>The costliest rejected drafts: the model was confident and the module far off (the model’s probability "
        "of its token times −log2 of the module’s).</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Rejected drafts"><table class="failed">'
        f"<thead><tr>{head}</tr></thead><tbody>{failed}</tbody></table></div>"
    )


def _failed(one: FailedDraft) -> str:
    wrong = "" if one["choice"] == one["token"] else f"<br><small>the text has {_code(one['token'])}</small>"
    return (
        f"<tr><td>{one['place']:,}</td><td>{_code(one['before'])}</td>"
        f"<td>{_code(one['choice'])} {one['choice_p']:.0%}{wrong}</td>"
        f"<td>{_code(one['draft'])} {one['draft_p']:.0%}</td><td>{one['missed_bits']:.1f} bits</td></tr>"
    )


def method(facts: Facts) -> str:
    """How the figures were measured, and what was kept."""
    text, attention = facts["text"], facts["attention"]
    kept = (
        f"Of each head’s attention the {attention['keys']} strongest weights were kept, if at least "
        f"{attention['least']:g}, in thousandths: {percent(attention['share'])} of all weight."
    )
    if attention["every"] > 1:
        kept += f" To keep the page small this was done for every {attention['every']}th token."
    sentences = [
        f"The text was processed in {text['windows']:,} windows of at most {text['window']:,} tokens, each a separate "
        "forward pass that starts with BOS. BOS is shown but not counted in any statistic.",
        f"Statistics cover all {text['tokens']:,} tokens"
        + (
            "; the text was truncated, and <code>--tokens</code> raises the limit."
            if text["cut"]
            else ": the whole text."
        ),
        "Tokens are shown individually in excerpts, each the beginning of a window, so that everything they attend to "
        "is shown too; <code>--shown</code> sets how many.",
        kept,
        "Attention weights are computed in the absorbed form: the key part of the up-projection is absorbed into the "
        "query, and keys are the cached latents.",
    ]
    return "<ul>" + "".join(f"<li>{sentence}</li>" for sentence in sentences) + "</ul>"


# ---------------------------------------------------------------------------------------------------------- words


def _share(share: float | None) -> str:
    if share is None:
        return "–"
    return f'<span class="meter" style="--share: {share:.3f}" aria-hidden="true"></span><b>{share:.1%}</b>'


def percent(share: float | None) -> str:
    """A share, or a dash for none."""
    return "–" if share is None else f"{share:.1%}"


def _number(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"


def _code(text: str) -> str:
    """Text with its blanks made visible, as `visible` in page/elements.js has it."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
    shown = re.sub(" +", lambda run: "␣" * len(run[0]) if len(run[0]) < 4 else f"␣×{len(run[0])}·", shown)
    return f"<code>{escape(shown.replace(chr(10), '↵').replace(chr(9), '⇥').removesuffix('·'))}</code>"
