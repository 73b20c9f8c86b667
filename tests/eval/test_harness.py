"""lm-eval's own `hf` backend as judge: on tasks defined here `fathom eval` gives the same numbers for a model."""

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.cli import main
from fathom.data.tokenizer import load_tokenizer, train_tokenizer
from fathom.eval.likelihood import text_bits
from tests.model.configs import lively_model, tiny

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("accelerate", reason="lm-eval's hf backend needs accelerate")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from fathom.eval.harness import HarnessModel, run_tasks  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "dogs", "looked", "for", "bread", "near", "it"]
CONTEXT = 96
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: '{question}'
doc_to_target: '{answer}'
metric_list: {metrics}
"""


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words)) + "."


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are files here; what is made of them goes into a folder of the test."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with two MoE layers and an MTP module."""
    draw = random.Random(0)
    tokenizer = train_tokenizer([sentence(draw, 9) + "\n" for _ in range(40)], 320)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config = tiny(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT, num_nextn_predict_layers=1, **ids
    )  # fmt: skip
    out = tmp_path_factory.mktemp("eval") / "model"
    save_model(lively_model(config, seed=2), out, tokenizer)
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A multiple-choice task and a perplexity task; some texts are longer than the model's context."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(1)
    questions = [
        {"q": sentence(draw, words), "choices": [" " + sentence(draw, k) for k in (1, 2, 5)], "right": words % 3}
        for words in [*range(1, 13), 60]
    ]
    texts = [{"text": sentence(draw, words)} for words in (1, 7, 30, 150)]
    for name, rows in (("questions", questions), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choice = {"question": "{{q}}", "answer": "{{right}}", "metrics": "[{metric: acc}, {metric: acc_norm}]"}
    rolling = {
        "question": "", "answer": "{{text}}",
        "metrics": "[{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]",
    }  # fmt: skip
    written = {
        "choice": TASK.format(name="choice", data=folder / "questions.jsonl", kind="multiple_choice", **choice)
        + "doc_to_choice: '{{choices}}'\n",
        "bits": TASK.format(name="bits", data=folder / "texts.jsonl", kind="loglikelihood_rolling", **rolling),
    }
    for name, text in written.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in written}


@pytest.fixture(scope="module")
def peer(directory: Path) -> Any:
    """The same directory in lm-eval's own backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it knows the MTP layers of 61-layer models alone
        return HFLM(str(directory), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def ours(directory: Path) -> HarnessModel:
    return HarnessModel(load_model(directory), load_tokenizer(directory))


def by_peer(peer: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_defaults=False)  # reading the 14 000 tasks that come with it takes seconds
    found = lm_eval.simple_evaluate(peer, tasks=tasks, task_manager=manager, log_samples=False, **options)
    results: dict[str, Any] = found["results"]
    return results


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if isinstance(value, float)}


def test_tasks_give_the_numbers_of_the_hf_backend(
    directory: Path, tasks: dict[str, str], peer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    main(["eval", str(directory), "--tasks", *tasks.values(), "--json", str(out)])
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    expected = by_peer(peer, list(tasks.values()))
    assert found.keys() == expected.keys() == tasks.keys()
    for name in tasks:
        assert figures(found[name]) == pytest.approx(figures(expected[name]), rel=1e-5)
    assert 0 < found["choice"]["acc,none"] < 1, "all or nothing would prove little"
    assert f"{found['bits']['bits_per_byte,none']:.4f}" in said


def test_questions_put_by_the_chat_template_give_the_numbers_of_the_hf_backend(
    directory: Path, tasks: dict[str, str], peer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    main(["eval", str(directory), "--tasks", tasks["choice"], "--chat", "--few-shot", "1", "--json", str(out)])
    found = json.loads(out.read_text())["choice"]
    chat, plain = (by_peer(peer, [tasks["choice"]], num_fewshot=1, apply_chat_template=put) for put in (True, False))
    assert figures(found) == pytest.approx(figures(chat["choice"]), rel=1e-5)
    assert figures(chat["choice"]) != pytest.approx(figures(plain["choice"]), rel=1e-5)


def test_a_conversation_has_the_tokens_of_the_hf_backend(directory: Path, peer: Any) -> None:
    model = HarnessModel(load_model(directory), load_tokenizer(directory), chat=True)
    history = [
        {"role": "system", "content": "Say it."},
        {"role": "user", "content": "the cat\n"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "on <｜User｜> it"},
    ]
    for messages, generation in ((history, True), (history[:3], False)):
        text = model.apply_chat_template(messages, generation)
        assert text == peer.apply_chat_template(messages, generation)
        assert model.tok_encode(text) == peer.tok_encode(text)
        pair = model._encode_pair(text, " mat")
        assert pair == peer._encode_pair(text, " mat")
    assert model.tok_encode("the cat") == peer.tok_encode("the cat")
    instance = Instance("generate_until", {}, (text, {"until": ["k"], "max_gen_toks": 20}), 0)
    with torch.no_grad():
        assert model.generate_until([instance]) == peer.generate_until([instance], disable_tqdm=True)


def test_the_chat_template_must_be_there(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    tokenizer.config.pop("chat_template")
    with pytest.raises(ValueError, match="no chat template"):
        HarnessModel(load_model(directory), tokenizer, chat=True)


def test_few_shot_examples_and_limits_are_passed_on(ours: HarnessModel, peer: Any, tasks: dict[str, str]) -> None:
    found = run_tasks(ours._model, ours._tokenizer, [tasks["choice"]], few_shot=2, limit=5)["choice"]
    expected = by_peer(peer, [tasks["choice"]], num_fewshot=2, limit=5)["choice"]
    assert found["sample_len"] == 5
    assert figures(found) == pytest.approx(figures(expected), rel=1e-5)


def test_likelihoods_of_each_request_are_those_of_the_hf_backend(ours: HarnessModel, peer: Any) -> None:
    draw = random.Random(3)
    contexts = ["", *(sentence(draw, words) for words in (1, 3, 20, 80)), "ends in a blank "]
    pairs = [(context, " " + sentence(draw, words)) for context in contexts for words in (1, 4)]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found, expected = ours.loglikelihood(requests), peer.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], rel=1e-5)


def test_generated_answers_are_those_of_the_hf_backend(ours: HarnessModel, peer: Any) -> None:
    draw = random.Random(4)
    # Letters of no control token: lm-eval looks for them in spelled-out control tokens, too.
    wishes = [{"until": ["\n\n"], "max_gen_toks": 30}, {"until": ["k", "w"], "max_gen_toks": 20, "do_sample": False}]
    pairs = [(sentence(draw, words), dict(wish)) for words in (1, 6, 90) for wish in wishes]
    requests = [Instance("generate_until", {}, pair, 0) for pair in pairs]
    with torch.no_grad():
        expected = [peer.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert ours.generate_until(requests) == expected
    assert len(set(expected)) > 3


def test_wishes_that_are_not_understood_are_named(ours: HarnessModel) -> None:
    with pytest.raises(ValueError, match="num_beams"):
        ours.generate_until([Instance("generate_until", {}, ("the", {"num_beams": 4}), 0)])


@pytest.mark.parametrize("wishes", [{"max_gen_toks": CONTEXT}, {"until": ["k"], "max_gen_toks": 500}, {}])
def test_answers_that_no_context_has_room_for_are_cut(ours: HarnessModel, wishes: dict[str, Any]) -> None:
    """lm-eval's own default is 256 tokens; the other tasks of the call keep their figures."""
    context = sentence(random.Random(5), 70)
    instance = Instance("generate_until", {}, (context, wishes), 0, ("long", 0, 1))
    with pytest.warns(UserWarning, match=rf"task long: max_gen_toks is \d+, .*{CONTEXT}: answers end after 48 tokens"):
        [answer] = ours.generate_until([instance])
    [expected] = ours.generate_until([Instance("generate_until", {}, (context, wishes | {"max_gen_toks": 48}), 0)])
    assert answer == expected


def test_an_answer_that_ends_in_an_error_is_not_scored_as_empty(directory: Path) -> None:
    broken = load_model(directory)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    model = HarnessModel(broken, load_tokenizer(directory))
    with pytest.raises(ValueError, match=r"task broken: .* not finite"):
        model.generate_until([Instance("generate_until", {}, ("the", {"max_gen_toks": 4}), 0, ("broken", 0, 1))])


def test_a_text_costs_what_the_perplexity_task_says(ours: HarnessModel) -> None:
    """The task predicts the BOS token as well, which is no part of the text."""
    text = sentence(random.Random(5), 20)
    model, tokenizer = ours._model, ours._tokenizer
    [whole] = ours.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    with torch.no_grad():
        first = model(torch.tensor([[tokenizer.bos_id] * 2])).logits_BSO[0, 0].log_softmax(-1)[tokenizer.bos_id]
        ids = [tokenizer.bos_id] * 2 + tokenizer.encode(text, bos=False)
        logprobs_SO = model(torch.tensor([ids])).logits_BSO[0].log_softmax(-1)
    assert whole - float(first) == pytest.approx(
        float(logprobs_SO[torch.arange(1, len(ids) - 1), ids[2:]].sum()), rel=1e-5
    )
    assert text_bits(model, tokenizer, text).bytes == len(text)


def test_a_task_that_does_not_exist_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(directory), "--tasks", "nowhere.yaml"])
    assert stop.value.code == 2
    assert "nowhere.yaml" in capsys.readouterr().err
