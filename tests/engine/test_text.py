"""Text in Python as over HTTP: stop strings, conversations, streams."""

import random
from dataclasses import replace

import pytest
import torch

from fathom.data.tokenizer import Tokenizer, train_tokenizer
from fathom.engine.detokenizer import OutputStream, first_stop
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.transformer import Model
from tests.engine.backends.make import every_backend, use
from tests.model.configs import lively_model, tiny

GREETING = [{"role": "system", "content": "sit"}, {"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat é 日本語 " * 40], 300)


def text_model(tokenizer: Tokenizer) -> Model:
    config = tiny(
        vocab_size=tokenizer.vocab_size, num_hidden_layers=2, num_nextn_predict_layers=1, max_position_embeddings=256
    )
    return lively_model(config, seed=3, std=0.2)


@every_backend
def test_a_stop_string_ends_the_output(name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    place = use(monkeypatch, name)
    engine = Engine(place(text_model(tokenizer)), tokenizer, speculative=2)
    count = 6 if name == "cuda_graph" else 40
    [whole] = engine.generate(["the cat"], SamplingParams(max_tokens=count, ignore_eos=True))
    assert whole.text is not None and len(whole.text) > 3
    stop = whole.text[2:4]
    [cut] = engine.generate(["the cat"], SamplingParams(max_tokens=count, ignore_eos=True, stop=[stop]))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.generation.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in tokenizer.decode(cut.token_ids) and stop not in tokenizer.decode(cut.token_ids[:-1])


@pytest.mark.parametrize("speculative", [False, 3])
def test_stop_strings_cut_where_the_first_is_complete(tokenizer: Tokenizer, speculative: bool | int) -> None:
    """Judged by the text alone, for stop strings anywhere in it, within tokens and across them."""
    engine = Engine(text_model(tokenizer), tokenizer, speculative=speculative)
    free = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0}
    rng = random.Random(1)
    across = 0
    for seed in range(12):
        [whole] = engine.generate(["the cat"], SamplingParams(seed=seed, **free))
        assert whole.text is not None
        begins = [rng.randrange(len(whole.text) - 6) for _ in range(2)]
        stops = [whole.text[begin : begin + rng.randint(1, 6)] for begin in begins] + ["not there"]
        ends = [(whole.text.index(stop) + len(stop), whole.text.index(stop), stop) for stop in stops[:2]]
        _, cut, stop = min(ends)
        params = SamplingParams(seed=seed, stop=stops, **free)
        [found] = engine.generate(["the cat"], params)
        assert (found.text, found.finish_reason) == (whole.text[:cut], "stop")
        assert found.generation.stop_reason == stop
        assert "".join(engine.stream("the cat", params)) == found.text
        across += len(found.token_ids) > 1 and stop not in tokenizer.decode(found.token_ids[-1:])
    assert across > 2, "hardly any stop string spans tokens"


def test_a_stop_token_is_no_part_of_the_text(tokenizer: Tokenizer) -> None:
    engine = Engine(text_model(tokenizer), tokenizer)
    [whole] = engine.generate(["the cat"], SamplingParams(max_tokens=20, ignore_eos=True))
    stop = whole.token_ids[7]
    [cut] = engine.generate(["the cat"], SamplingParams(max_tokens=20, ignore_eos=True, stop_ids=(stop,)))
    assert cut.generation.stop_reason == stop and cut.token_ids[-1] == stop
    assert cut.text == tokenizer.decode(cut.token_ids[:-1])


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    engine = Engine(text_model(tokenizer), tokenizer, speculative=False)
    [whole] = engine.generate(["the cat"], SamplingParams(max_tokens=30, ignore_eos=True))
    assert whole.text is not None
    stop = whole.text[5:12]
    handle = engine.submit("the cat", SamplingParams(max_tokens=30, ignore_eos=True, stop=stop))
    output, text = OutputStream(handle, tokenizer), ""
    while engine.has_work:
        engine.step()
        text += output.new_text()
        assert whole.text[: whole.text.index(stop)].startswith(text)
    assert text == whole.text[: whole.text.index(stop)]


def test_first_stop_is_the_one_complete_first() -> None:
    assert first_stop("abcd", ["abcd", "bc"]) == (1, "bc")
    assert first_stop("abcd", ["x"]) is None


@pytest.mark.parametrize("stop", [[""], "", [1], {"a": 1}])
def test_wrong_stop_strings_are_named(stop: object) -> None:
    with pytest.raises(ValueError, match=r"stop is .* none of them empty"):
        SamplingParams(stop=stop)  # type: ignore[arg-type]


def test_stop_strings_need_a_tokenizer(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"stop is \['x'\].*stop_ids"):
        Engine(text_model(tokenizer)).submit([1], SamplingParams(stop="x"))


@every_backend
def test_a_conversation_is_its_template_continued(
    name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = use(monkeypatch, name)
    engine = Engine(place(text_model(tokenizer)), tokenizer)
    params = SamplingParams(max_tokens=4 if name == "cuda_graph" else 20, stop="zzz")
    answer = engine.chat(GREETING, params)
    system, user, assistant = tokenizer.system_id, tokenizer.user_id, tokenizer.assistant_id
    said = [tokenizer.encode(message["content"], bos=False) for message in GREETING]
    ids = [tokenizer.bos_id, system, *said[0], user, *said[1], assistant]
    assert answer.generation.prompt_ids == engine.encode_chat(GREETING) == ids
    [expected] = engine.generate([ids], params)
    assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)


def test_conversations_without_a_template_are_explained(tokenizer: Tokenizer) -> None:
    model = text_model(tokenizer)
    with pytest.raises(ValueError, match="no tokenizer, so it has no chat template"):
        Engine(model).chat(GREETING)
    bare = Tokenizer(tokenizer.tokenizer_json, {**tokenizer.config, "chat_template": None})
    with pytest.raises(ValueError, match="no chat template"):
        Engine(model, bare).chat(GREETING)
    with pytest.raises(ValueError, match="role robot"):
        Engine(model, tokenizer).chat([{"role": "robot", "content": "hi"}])


def test_params_belong_to_the_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="params is given beside a Request"):
        Engine(text_model(tokenizer)).submit(Request([1]), SamplingParams())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_no_token_has_are_never_sampled(tokenizer: Tokenizer, temperature: float) -> None:
    """A model's vocabulary is often padded; here its padding has the largest logits, drafts included."""
    config = replace(text_model(tokenizer).config, vocab_size=tokenizer.vocab_size + 40)
    model = lively_model(config, seed=1)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] *= 3
    params = [SamplingParams(temperature=temperature, seed=s, max_tokens=40, ignore_eos=True) for s in range(4)]
    with_padding = Engine(model, speculative=2).generate([tokenizer.encode("the")] * 4, params)
    assert any(token >= tokenizer.vocab_size for found in with_padding for token in found.token_ids)
    for found in Engine(model, tokenizer, speculative=2).generate(["the"] * 4, params):
        assert all(token < tokenizer.vocab_size for token in found.token_ids)
