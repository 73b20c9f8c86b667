"""`fathom generate`: sampled by default, log-probabilities where requested, and a loop is reported as one."""

from pathlib import Path

import pytest

from fathom.checkpoint.hf.model import load_model
from fathom.cli import main
from fathom.cli.generation import loop_at_end
from fathom.data.tokenizer import load_tokenizer
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from tests.serve.random_model import save_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("generate") / "model", spare_ids=False)


def generate(model: Path, *flags: str) -> None:
    main(["generate", str(model), "--prompt", "The number", *flags])


def test_it_samples_at_a_temperature_of_seven_tenths(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for flags in ([], ["--temperature", "0.7"], ["--temperature", "0"], ["--seed", "1"]):
        generate(model, "--max-tokens", "24", *flags)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len(set(outputs)) == 3


def test_log_probabilities_are_printed_token_by_token(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(model, "--max-tokens", "5", "--logprobs", "2", "--prompt-logprobs", "0", "--temperature", "0")
    text, _, table = capsys.readouterr().out.partition("logprob  rank  token\n")
    params = SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=0)
    tokenizer = load_tokenizer(model)
    [answer] = Engine(load_model(model), tokenizer, max_batch=1).generate(["The number"], params)
    assert answer.logprobs is not None and answer.prompt_logprobs is not None
    rows = [line.split() for line in table.splitlines()]
    expected = [*answer.prompt_logprobs, *answer.logprobs]
    assert [(float(row[0]), int(row[1])) for row in rows] == [
        (pytest.approx(each.logprob, abs=2e-3), each.rank) for each in expected
    ]
    assert ["likeliest:" in line for line in table.splitlines()] == [False] * (len(rows) - 5) + [True] * 5
    assert text.startswith("The number")
    generate(model, "--max-tokens", "5")
    assert "logprob" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ids", "loop"),
    [
        ([1, 2, *range(10, 18), *range(10, 18), *range(10, 18)], (8, 3)),
        ([*range(10, 22)] * 4 + [10, 11], (12, 4)),  # cut off within the fifth
        ([5, *[7] * 24], (1, 24)),
        ([5, *[7] * 23], None),
        ([1, 2, 3] * 9, (3, 9)),
        ([1, 2, 3] * 8, None),  # 24 tokens, but nine are the first multiple of three from eight up
        ([*range(10, 18)] * 3 + [2], None),  # it went on
        (list(range(60)), None),
        ([], None),
    ],
)
def test_a_loop_is_three_repetitions_of_eight_tokens(ids: list[int], loop: tuple[int, int] | None) -> None:
    assert loop_at_end(ids) == loop


def test_a_loop_is_reported_in_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A bias that no other token reaches repeats token 40.
    generate(model, "--max-tokens", "30", "--logit-bias", "40", "100")
    lines = [line for line in capsys.readouterr().err.splitlines() if "loop" in line]
    assert len(lines) == 1 and "the same token 30 times in a row" in lines[0]
    generate(model, "--max-tokens", "10")
    assert "loop" not in capsys.readouterr().err
