"""`fathom serve`: the OpenAI protocol and a web page."""

import sys

import tyro

from fathom.config import ConfigError


def run(words: list[str]) -> None:
    try:
        from fathom.serve.server import ServeCommand, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"fathom serve needs {error.name}: pip install 'fathom-lm[serve]'") from error
    status = serve(tyro.cli(ServeCommand, args=words, prog="fathom serve"))
    if status:
        sys.exit(status)
