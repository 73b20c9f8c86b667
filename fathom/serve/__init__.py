"""Serving over HTTP: the OpenAI protocol, the page, what they need of an engine in a thread of its own."""
