"""lm-eval over HTTP gives what it gives offline: `local-completions` against our server, `hf` on the files."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.random_model import save_random_model
from tests.serve.running import running

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("aiohttp", reason="lm-eval asks servers with aiohttp")
pytest.importorskip("llguidance", reason="the server needs llguidance")
pytestmark = [pytest.mark.slow, pytest.mark.oracle]

QUESTIONS = [
    {
        "text": f"The number is {number}, größer als",
        "choices": [" 7", " [x, y]", " name: true 数据"],
        "right": number % 3,
    }
    for number in range(9)
]


def tasks(folder: Path) -> list[dict[str, Any]]:
    """Log-likelihoods of given endings, and texts that are generated up to a stop string."""
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(each) for each in QUESTIONS))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    shared |= {"doc_to_text": "{{text}}", "metadata": {"version": 1}}
    choice = {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    choice |= {"doc_to_target": "{{right}}", "target_delimiter": ""}
    choice["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    write = {"task": "texts", "output_type": "generate_until", "doc_to_target": "{{choices[right]}}"}
    # lm-eval's own backend would also find a letter of `<｜User｜>`, which the random model generates.
    write["generation_kwargs"] = {"until": ["L"], "max_gen_toks": 24, "do_sample": False}
    write["metric_list"] = [{"metric": "exact_match"}]
    return [shared | choice, shared | write]


def judged(folder: Path, backend: str, settings: dict[str, Any]) -> Any:
    return lm_eval.simple_evaluate(
        model=backend, model_args=settings, tasks=tasks(folder), log_samples=True, bootstrap_iters=0, batch_size=4
    )


def test_scores_over_http_are_those_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = save_random_model(tmp_path / "model", spare_ids=False)  # which transformers would sample
    files = {
        "pretrained": str(directory),
        "dtype": "float32",
        "device": "cpu",
        "max_length": 512,
        "add_bos_token": True,
    }
    offline = judged(tmp_path, "hf", files)
    with running(directory, tmp_path / "log.txt", "--dtype", "float32", "--name", "small") as server:
        there = {"model": "small", "base_url": f"{server.address}/v1/completions", "tokenizer": str(directory)}
        there |= {"tokenizer_backend": "huggingface", "num_concurrent": 3, "max_length": 512, "add_bos_token": True}
        online = judged(tmp_path, "local-completions", there)
    assert online["results"]["choices"]["acc,none"] == offline["results"]["choices"]["acc,none"]
    assert online["results"]["choices"]["acc_norm,none"] == offline["results"]["choices"]["acc_norm,none"]
    for ours, theirs in zip(*(sorted_samples(each, "choices") for each in (online, offline)), strict=True):
        assert [value for [(value, _)] in ours] == pytest.approx([value for [(value, _)] in theirs], abs=2e-3)
        assert [greedy for [(_, greedy)] in ours] == [greedy for [(_, greedy)] in theirs]
    assert sorted_samples(online, "texts") == sorted_samples(offline, "texts")
    assert len({str(texts) for texts in sorted_samples(online, "texts")}) > 1


def sorted_samples(result: Any, task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(result["samples"][task], key=lambda sample: sample["doc_id"])]
