"""The service and the engine's thread, in this process: which thread does what, and isolation of failures."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("llguidance", reason="the server needs llguidance")
import httpx
import torch
from torch import Tensor

from fathom.checkpoint.hf.model import load_model
from fathom.data.chat_template import ChatTemplate
from fathom.data.tokenizer import BOS, EOS, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, load_tokenizer
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.serve.app import make_app
from fathom.serve.body import MAX_VALUES
from fathom.serve.engine_thread import EngineThread, Job
from fathom.serve.grammar import Grammars
from fathom.serve.server import listen
from fathom.serve.service import Service
from tests.serve.random_model import CONFIG, save_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("random"))


@pytest.fixture
def engine(model: Path) -> Engine:
    return Engine(load_model(model), load_tokenizer(model), max_batch=4, max_waiting=4, cache_tokens=4096)


async def ended(job: Job) -> None:
    while not job.generations or not all(generation.finished for generation in job.generations):
        await asyncio.wait_for(job.next_events(), 30)


class Breaks:
    """A constraint that fails in the middle of a response, as a bug would."""

    def __init__(self) -> None:
        self.asked = 0

    def allowed(self, drafts: Sequence[int]) -> Tensor:
        self.asked += 1
        if self.asked > 4:
            raise RuntimeError("made to fail by a test")
        return torch.ones(len(drafts) + 1, CONFIG.vocab_size, dtype=torch.bool)

    def take(self, tokens: Sequence[int]) -> None:
        pass


def test_an_exception_in_one_request_leaves_the_others_alone(engine: Engine) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = engine.generate(["largest", "as 7"], params)

    async def serve() -> tuple[Job, Job]:
        engine_thread = EngineThread(engine)
        engine_thread.start()
        others = engine_thread.open(lambda: [Request("largest", params), Request("as 7", params)])
        broken = engine_thread.open(lambda: [Request("größer", params, constraint=Breaks())])
        await ended(broken)
        await ended(others)
        assert engine_thread.alive and engine_thread.failure is None
        await asyncio.to_thread(engine_thread.stop)
        return others, broken

    others, broken = asyncio.run(serve())
    assert [generation.finish_reason for generation in broken.generations] == ["error"]
    assert "made to fail" in (broken.generations[0].error or "")
    assert [generation.token_ids for generation in others.generations] == [each.token_ids for each in expected]
    assert engine.stats().pages_used == 0


def test_a_cancelled_request_gives_its_pages_back_within_one_step(engine: Engine) -> None:
    """Steps are counted from the client's disconnection."""
    steps: list[int] = []
    step_phases = engine.step_phases

    def counted() -> Any:
        time.sleep(0.01)
        yield from step_phases()
        steps.append(engine.stats().pages_used)

    engine.step_phases = counted  # type: ignore[method-assign]

    async def serve() -> int:
        engine_thread = EngineThread(engine)
        engine_thread.start()
        job = engine_thread.open(lambda: [Request("f", SamplingParams(max_tokens=400, ignore_eos=True))])
        await job.next_events()
        assert engine.stats().pages_used > 0
        engine_thread.close(job)
        before = len(steps)
        while engine.has_work:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine_thread.stop)
        return len(steps) - before

    assert asyncio.run(serve()) <= 1
    assert engine.stats().pages_used == 0


def test_many_tokens_a_second_make_few_events(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first event and the last are immediate, and no token is lost in between."""
    monkeypatch.setattr("fathom.serve.engine_thread._EVENTS_PER_SECOND", 20.0)

    async def serve() -> list[list[int]]:
        engine_thread = EngineThread(engine)
        engine_thread.start()
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        jobs = [engine_thread.open(lambda place=place: [Request("f", params, stream=place)]) for place in range(3)]

        async def token_counts(job: Job) -> list[int]:
            events = await job.next_events()
            while not events[-1].finished:
                events += await asyncio.wait_for(job.next_events(), 30)
            return [event.tokens for event in events]

        tokens = await asyncio.gather(*map(token_counts, jobs))
        await asyncio.to_thread(engine_thread.stop)
        return tokens

    began = time.monotonic()
    for tokens in asyncio.run(serve()):
        assert tokens[0] <= 2 and tokens[-1] == 200 and tokens == sorted(tokens)
        assert len(tokens) <= 3 + 20 * (time.monotonic() - began)


CHAT = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 2}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


def responses(engine: Engine, *requests: tuple[str, dict[str, Any]]) -> list[httpx.Response]:
    """Sent one after the other to an application in this process, whose event loop runs in this thread."""
    engine_thread = EngineThread(engine)
    service = Service(engine, engine_thread, "small", 30)
    app = make_app(service)

    async def serve() -> list[httpx.Response]:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return [await client.post(path, json=body) for path, body in requests]

    return asyncio.run(serve())


def test_tokenising_templates_and_grammars_stay_off_the_event_loop(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, set[str]] = {"encode": set(), "_pieces": set(), "of_schema": set()}

    def noted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            where[name].add("loop" if threading.current_thread() is threading.main_thread() else "elsewhere")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noted(type(engine.tokenizer), "encode")
    noted(ChatTemplate, "_pieces")
    noted(Grammars, "of_schema")
    replies = responses(
        engine,
        ("/v1/completions", {"prompt": "f", "max_tokens": 2}),
        ("/v1/chat/completions", CHAT | {"response_format": FORMAT}),
        ("/tokenize", {"prompt": "f"}),
        ("/tokenize", {"messages": CHAT["messages"]}),
    )
    assert [reply.status_code for reply in replies] == [200] * 4
    assert where == {"encode": {"elsewhere"}, "_pieces": {"elsewhere"}, "of_schema": {"elsewhere"}}


def test_short_bodies_do_not_wait_for_long_ones(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a long one is never prepared before all short ones are answered."""
    answered, plan = threading.Event(), Service.plan_completion

    def slow(self: Service, body: Any) -> Any:
        assert len(body.prompt) < 9 or answered.wait(30)
        return plan(self, body)

    monkeypatch.setattr(Service, "plan_completion", slow)
    app = make_app(Service(engine, EngineThread(engine), "small", 30))

    async def serve() -> list[int]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client,
        ):
            bodies = [{"prompt": "f" * 100_000}] * 20 + [{"prompt": "f", "max_tokens": 1}] * 3
            sent = [asyncio.ensure_future(client.post("/v1/completions", json=body)) for body in bodies]
            short = [reply.status_code for reply in await asyncio.gather(*sent[20:])]
            assert not any(each.done() for each in sent[:20])
            answered.set()
            return short + [reply.status_code for reply in await asyncio.gather(*sent[:20])]

    assert asyncio.run(serve()) == [200] * 3 + [400] * 20


LONG = "x y\n" * 100_000


@pytest.mark.parametrize("chat", [False, True])
def test_texts_that_are_far_too_long_are_refused_before_they_are_tokenised(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    characters: list[int] = []
    encode_batch = engine.tokenizer.encode_batch  # type: ignore[union-attr]
    monkeypatch.setattr(
        engine.tokenizer, "encode_batch", lambda texts: characters.append(sum(map(len, texts))) or encode_batch(texts)
    )
    messages = [{"role": "user", "content": LONG[:9]}, {"role": "user", "content": LONG}]
    [reply] = responses(
        engine,
        ("/v1/chat/completions", {"messages": messages}) if chat else ("/v1/completions", {"prompt": LONG}),
    )
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"
    assert 0 < sum(characters) < len(LONG) / 10


def test_bodies_of_too_many_values_are_refused_before_they_are_parsed(engine: Engine) -> None:
    """Commas within texts are no values."""
    many = MAX_VALUES + 2
    refused, tokenized = responses(
        engine, ("/detokenize", {"tokens": [5] * many}), ("/tokenize", {"prompt": '\\",' * many})
    )
    assert refused.status_code == 400 and "values" in refused.text
    assert tokenized.status_code == 200 and tokenized.json()["count"] > 1000


def test_suffixes_and_spelled_prompts_are_filled_in(engine: Engine) -> None:
    """Only where the whole prompt is one to fill in; what is spelled inside it is text."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None and tokenizer.fim_prefix_id is not None
    before, after = tokenizer.encode("def f(", bos=False), tokenizer.encode(f"\n{EOS}", bos=False)
    ids = [tokenizer.bos_id, tokenizer.fim_prefix_id, *before, tokenizer.fim_suffix_id, *after, tokenizer.fim_middle_id]
    spelled = f"{FIM_PREFIX}def f({FIM_SUFFIX}\n{EOS}{FIM_MIDDLE}"
    prompts: list[dict[str, Any]] = [
        {"prompt": ids},
        {"prompt": "def f(", "suffix": f"\n{EOS}"},
        {"prompt": spelled},
        {"prompt": BOS + spelled},
        {"prompt": f"{spelled}."},
        {"prompt": f"{FIM_PREFIX}{spelled}"},
    ]
    replies = responses(engine, *(("/v1/completions", body | {"temperature": 0, "seed": 0}) for body in prompts))
    texts = [reply.json()["choices"][0]["text"] for reply in replies]
    counts = [reply.json()["usage"]["prompt_tokens"] for reply in replies]
    assert texts[:4] == texts[:1] * 4 and counts[:4] == [len(ids)] * 4
    assert counts[4:] == [len(tokenizer.encode(body["prompt"])) for body in prompts[4:]]


def test_infill_as_editors_ask_for_it(engine: Engine) -> None:
    """The text that a completion with the same suffix has; also in a stream."""
    body = {
        "input_prefix": "def f(\n",
        "prompt": "x",
        "input_suffix": ")\n",
        "n_predict": 9,
        "temperature": 0,
        "stop": [],
    }
    body |= {"input_extra": [{"filename": "a.py", "text": "import b", "time": 1}], "samplers": ["top_k"], "n_indent": 4}
    same = {"prompt": "import b\n\ndef f(\nx", "suffix": ")\n", "max_tokens": 9, "temperature": 0}
    whole, stream, expected, alone = responses(
        engine,
        ("/infill", body | {"cache_prompt": True, "t_max_predict_ms": 500}),
        ("/infill", body | {"stream": True}),
        ("/v1/completions", same),
        ("/infill", {"input_prefix": "def", "n_predict": 1}),
    )
    choice, usage = expected.json()["choices"][0], expected.json()["usage"]
    assert whole.json()["content"] == choice["text"] and whole.json()["stop"] is True
    assert whole.json()["tokens_evaluated"] == usage["prompt_tokens"]
    assert whole.json()["tokens_predicted"] == usage["completion_tokens"] == 9
    chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["content"] for chunk in chunks) == choice["text"]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert alone.status_code == 200 and alone.json()["tokens_predicted"] == 1


# Compiles, and fails with the first mask.
MANY_PROPERTIES = {"type": "object", "properties": {f"p{number}": True for number in range(8000)}}

REFUSED = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"pattern": "("}}}},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "no"}}}]},
    {"logit_bias": {"99999": 1}},
    {"prompt_embeds": "gASVBAAAAAAAAABLAS4="},
    {"chat_template": "{{ messages.__class__ }}"},
    {"chat_template_kwargs": {"tokenize": True}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": MANY_PROPERTIES}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": []}}}},
    {"n": 5},
]


@pytest.mark.parametrize("change", REFUSED, ids=[next(iter(change)) + str(n) for n, change in enumerate(REFUSED)])
def test_invalid_requests_never_reach_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(engine, "step", lambda: pytest.fail("the engine was called"))
    [reply] = responses(engine, ("/v1/chat/completions", CHAT | change))
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    assert engine.stats().prompt_tokens == 0


def test_an_unexpected_exception_is_a_500_without_traceback(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request succeeds."""
    service_encode = Service.plan_completion

    def defective(self: Service, body: Any) -> Any:
        if body.prompt == "bad":
            raise RuntimeError("secret in /srv/models/private.py")
        return service_encode(self, body)

    monkeypatch.setattr(Service, "plan_completion", defective)
    bad, good = responses(
        engine, *(("/v1/completions", {"prompt": prompt, "max_tokens": 2}) for prompt in ("bad", "good"))
    )
    assert bad.status_code == 500 and good.status_code == 200
    assert bad.json()["error"]["type"] == "server_error"
    assert not any(word in bad.text for word in ("secret", "/srv", "RuntimeError", "Traceback"))


def test_health_is_503_once_the_engine_has_failed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("made to fail by a test")

    engine.step_phases = fail  # type: ignore[method-assign]
    engine_thread = EngineThread(engine)
    service = Service(engine, engine_thread, "small", 30)
    app = make_app(service)

    async def serve() -> list[int]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client,
        ):
            before = await client.get("/health")
            answers = [await client.post("/v1/completions", json={"prompt": "f"})]
            after = await client.get("/health")
            answers.append(await client.post("/v1/completions", json={"prompt": "f"}))
        return [reply.status_code for reply in (before, answers[0], after, answers[1])]

    assert asyncio.run(serve()) == [200, 503, 503, 503]
    assert isinstance(engine_thread.failure, RuntimeError)


def test_connections_have_tcp_nodelay() -> None:
    """With Nagle's algorithm a response in two writes waits 40 ms for the client's delayed acknowledgement."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listen("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(connected, sock=listening):
                _, writer = await asyncio.open_connection(*listening.getsockname())
                nodelay = await asyncio.wait_for(found, 10)
                writer.close()
        return nodelay

    assert asyncio.run(accepted()) != 0


def test_without_a_tokenizer_token_ids_are_served(model: Path) -> None:
    """Texts are refused with a reason; the ids are those of the engine."""
    bare = Engine(load_model(model), None, max_batch=4, cache_tokens=4096)
    ids = [5, 60, 70, 80]
    [expected] = bare.generate([ids], SamplingParams(max_tokens=4, ignore_eos=True))
    body = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    served, text, chat, tokenized, suffix, back = responses(
        bare,
        ("/v1/completions", body | {"prompt": ids, "fathom": {"drafts": True}}),
        ("/v1/completions", body | {"prompt": "f"}),
        ("/v1/chat/completions", CHAT),
        ("/tokenize", {"prompt": "f"}),
        ("/v1/completions", body | {"prompt": "f", "suffix": "g"}),
        ("/detokenize", {"tokens": ids}),
    )
    [choice] = served.json()["choices"]
    assert [token["id"] for token in choice["fathom"]["tokens"]] == expected.token_ids
    assert choice["text"] == "" and served.json()["usage"]["completion_tokens"] == 4
    for refused in (text, tokenized):
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "no_tokenizer"
    assert chat.status_code == 400 and suffix.status_code == 400 and back.json() == {"prompt": ""}
