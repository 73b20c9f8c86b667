"""The inspector's page: one HTML file without network access.

Static parts are text, tables and SVG (`sections.py`); interactive parts are drawn by the scripts in `page/` from the
same figures, which are embedded as JSON. All text from data is escaped or inserted as a text node.
"""

import json
from html import escape
from importlib import resources

from fathom.lab.figures import STYLE
from fathom.lab.inspector import sections
from fathom.lab.inspector.facts import Facts
from fathom.lab.inspector.sections import percent

_SCRIPTS = ("elements.js", "token.js", "excerpt.js", "experts.js", "together.js", "main.js")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Whatever data the page contains, it can load nothing and send nothing."""


def page_of(facts: Facts) -> str:
    """The whole page."""
    title = f"Fathom inspects {facts['model']['name']}"
    parts = [
        ("tokens", "Token by token", sections.tokens),
        ("experts", "Experts and their tokens", sections.experts),
        ("load", "Load and bias", sections.load),
        ("together", "Experts selected together", sections.together),
        ("latents", "How much of the latent is used", sections.latents),
        ("drafts", "Where drafts fail", sections.drafts),
        ("method", "How this was measured", sections.method),
    ]
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in parts)
    body = "".join(_section(name, heading, draw(facts)) for name, heading, draw in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_part('style.css')}</style></head>\n"
        f'<body><main>{_headline(title, facts)}<nav aria-label="Sections"><ul>{links}</ul></nav>\n{body}</main>\n'
        f'<script type="application/json" id="facts">{_embedded(facts)}</script>\n'
        f'<script type="module">{"".join(map(_part, _SCRIPTS))}</script></body></html>\n'
    )


def _section(name: str, heading: str, content: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{heading}</h2>{content}</section>\n'
    )


def _part(name: str) -> str:
    return (resources.files("fathom.lab.inspector") / "page" / name).read_text(encoding="utf-8")


def _embedded(facts: Facts) -> str:
    """JSON that cannot end the element that contains it."""
    return json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _headline(title: str, facts: Facts) -> str:
    text, model = facts["text"], facts["model"]
    cards = [
        ("bits per byte", f"{text['bits_per_byte']:.3f}"),
        ("bits per token", f"{text['bits_per_token']:.2f}"),
        ("tokens", f"{text['tokens']:,}"),
    ]
    if facts["routers"]:
        cards.append(("MaxVio, worst router", f"{max(router['max_violation'] for router in facts['routers']):.2f}"))
    used = sorted(layer["dimensions_99"] for layer in facts["latents"])
    cards.append((f"of {model['latent_rank']} latent dimensions hold 99 %", _span(used[0], used[-1])))
    cards += [
        (f"of the drafts of MTP module {draft['module']} agree", percent(draft["agree"])) for draft in facts["drafts"]
    ]
    figures = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cards)
    cut = ", truncated" if text["cut"] else ""
    return (
        f"<h1>{escape(title)}</h1><p>What its experts, heads, latents and drafts do with "
        f"<strong>{escape(text['name'])}</strong>{cut}: {text['bytes']:,} bytes.</p>"
        f'<dl class="cards">{figures}</dl>'
        "<noscript><p>Without JavaScript the page shows its static parts only; everything is in this "
        "file.</p></noscript>"
    )


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"
