"""Limits of the JSON schemas that a request may bring."""

from pydantic import JsonValue

MAX_SCHEMA_CHARS = 65536
MAX_SCHEMA_DEPTH = 32
MAX_PATTERN_CHARS = 1024


def check_schema(schema: JsonValue, name: str) -> None:
    """Raises ValueError where a schema is too large or too deep, or holds too long a pattern."""
    size, waiting = 0, [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"{name} is nested deeper than {MAX_SCHEMA_DEPTH}")
        size += len(value) if isinstance(value, str) else 1
        if isinstance(value, dict):
            for key, content in value.items():
                size += len(key)
                if key in ("pattern", "patternProperties"):
                    _check_pattern(content, name)
                if key == "$ref" and isinstance(content, str) and not content.startswith("#"):
                    raise ValueError(f"{name} refers to {content[:80]!r}; only references within it (#…) are followed")
                waiting.append((content, depth + 1))
        elif isinstance(value, list):
            waiting += [(content, depth + 1) for content in value]
        if size > MAX_SCHEMA_CHARS:
            raise ValueError(f"{name} is larger than {MAX_SCHEMA_CHARS} characters")


def _check_pattern(content: JsonValue, name: str) -> None:
    for pattern in [content] if isinstance(content, str) else content if isinstance(content, dict) else []:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise ValueError(f"{name} has a pattern of {len(pattern)} characters; the limit is {MAX_PATTERN_CHARS}")
