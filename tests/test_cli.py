"""The command line as a user meets it: help, one-line errors, a run from flags, text from a directory."""

import json
from pathlib import Path

import pytest

from fathom.checkpoint.hf.model import load_config
from fathom.cli import main
from fathom.data.tokenizer import save_tokenizer, train_tokenizer


def test_help_names_every_command_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    for word in ("train", "generate", "demo", "--resume", "torchrun", "nano", "deepseek-v3-671b"):
        assert word in text


@pytest.mark.parametrize("arguments", [["train", "nano", "--help"], ["generate", "--help"], ["demo", "--help"]])
def test_each_command_explains_its_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "no command 'dance'; there are train, "),
        (["train", "nan"], "no preset 'nan'; there are nano"),
        (["train", "--out", "x"], "name a preset"),
        (["train", "--resume", "--out", "/nonexistent"], "holds no run to resume"),
        (["generate", "/nonexistent/model", "--prompt", "a"], "/nonexistent/model"),
        (["train", "nano", "--model.n-group", "3"], "n_group is 3; it must be a divisor of n_routed_experts (16)"),
    ],
)
def test_wrong_input_is_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert message in " ".join((shown.err + shown.out).split())
    assert "Traceback" not in shown.err


def test_a_renamed_command_still_works_and_says_its_new_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "magic"])
    assert stop.value.code == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "fathom study is now called fathom ablations" in shown and "no ablation 'magic'" in shown


def test_train_then_generate(tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    main(["train", *tiny_flags, "--train.steps", "4", "--out", str(out)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = {"step", "loss", "mtp_loss", "balance_loss", "max_vio", "grad_norm", "lr", "tokens_per_second", "mfu"}
    assert keys <= rows[0].keys()
    assert {"val_bpb", "mtp_acceptance"} <= rows[-1].keys()
    assert rows[3]["loss"] < rows[0]["loss"]
    capsys.readouterr()
    main(["generate", str(out / "model"), "--prompt", "the cat", "--max-tokens", "8"])
    assert capsys.readouterr().out.startswith("the cat")


def test_resume_takes_harmless_flags_and_refuses_those_of_another_run(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    main(["train", *tiny_flags, "--train.steps", "1", "--train.eval-sequences", "3", "--out", out])
    for words, name in ((["--resume"], "0.5"), ([*tiny_flags, "--resume"], "0.5"), (["nano", "--resume"], "has ")):
        with pytest.raises(SystemExit):
            main(["train", *words, "--optimizer.learning-rate", "0.5", "--out", out])
        message = " ".join(capsys.readouterr().err.split())
        assert name in message and "out to continue the run as it is" in message
    main(["train", *tiny_flags, "--out", out, "--resume"])  # what only measures keeps its value: 1 step, 3 sequences
    record = json.loads((tmp_path / "run" / "run.json").read_text())["train"]
    assert (record["steps"], record["eval_sequences"]) == (12, 4)
    assert (checkpoints / "step-000012").is_dir()
    main(["train", "--resume", "--train.steps", "14", "--out", out])
    assert (checkpoints / "step-000014").is_dir()
    record = json.loads((tmp_path / "run" / "run.json").read_text())["train"]
    assert (record["steps"], record["eval_sequences"]) == (14, 4)


def test_a_run_from_a_model_refuses_what_it_would_ignore(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *tiny_flags, "--train.steps", "1", "--out", str(tmp_path / "first")])
    model, second = str(tmp_path / "first" / "model"), str(tmp_path / "second")
    words = ["train", "nano", "--init", model, *tiny_flags[tiny_flags.index("--train.steps") :], "--out", second]
    for flags, message in (
        (["--model.hidden-size", "256"], "--model.hidden-size is 256; --init"),
        (["--model.num_nextn_predict_layers=0"], "--model.num-nextn-predict-layers is 0; --init"),
        (["--data.tokenizer", str(tmp_path / "other")], "data.tokenizer is"),
    ):
        save_tokenizer(train_tokenizer(["other words"] * 9, 300), tmp_path / "other")
        with pytest.raises(SystemExit):
            main([*words, *flags])
        assert message in " ".join(capsys.readouterr().err.split())
    main([*words, "--train.steps", "1", "--model.hidden-size", "32", "--model.num-nextn-predict-layers", "2"])
    assert load_config(second + "/model").num_nextn_predict_layers == 2


def test_old_flags_work_and_are_named_in_one_plain_line(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    main(["train", *tiny_flags, "--train.steps", "1", "--optimizer.clip", "0.5", "--out", str(out)])
    assert json.loads((out / "run.json").read_text())["optimizer"]["max_grad_norm"] == 0.5
    lines = [line for line in capsys.readouterr().err.splitlines() if "clip" in line]
    expected = "--optimizer.clip is now called --optimizer.max-grad-norm; the old name goes with the next release"
    assert lines == [f"note: {expected}"]


def test_names_in_damaged_files_are_printed_as_text_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line break, and no escape sequence that the terminal would follow."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "a\n\x1b]0;b": [1]}))
    index = {"weight_map": {"lm_head.weight": "\n\x1b[31mx"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (str(tmp_path), f"{tmp_path}\x1b[31m"):
        with pytest.raises(SystemExit):
            main(["info", path])
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and "\x1b" not in said and r"\x1b" in said
