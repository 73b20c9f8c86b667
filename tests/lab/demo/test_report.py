"""The page is strict XHTML whatever the data is, contains every figure, and says where one is missing."""

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fathom import presets
from fathom.lab.demo.page import _text, write_html
from fathom.lab.demo.report import Continuation, DemoReport, GeneratedToken, print_report

HOSTILE = '<script>alert("1")</script> & \'\x00\x1b[31m\ud800]]>'
XHTML = "{http://www.w3.org/1999/xhtml}"


def metrics(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": 8.0 / step, "mtp_loss": 9.0 / step, "max_vio": 2.0 / step})
        if step % 2 == 0 or steps == 1:
            rows.append({"step": step, "val_bpb": 3.0 / step, "val_max_vio": 1.0 / step, "mtp_acceptance": 0.5})
    return rows


def example() -> DemoReport:
    config = replace(
        presets.nano().model,
        hidden_size=256,
        intermediate_size=640,
        moe_intermediate_size=128,
        num_hidden_layers=6,
        q_lora_rank=128,
        kv_lora_rank=96,
        qk_nope_head_dim=48,
        v_head_dim=64,
    )
    routers = config.num_moe_layers + config.num_nextn_predict_layers
    skewed, level = [4 * [400] + 12 * [100]] * routers, [[175] * 16] * routers
    tokens = (GeneratedToken("    return", False), GeneratedToken(" self", True), GeneratedToken(HOSTILE, True))
    return DemoReport(
        config=config,
        corpus="python-stdlib, 9.5 MB",
        metrics=metrics(8),
        loads=[(1, skewed), (4, level), (8, level)],
        bits_per_byte=1.354,
        gzip=2.219,
        xz=1.998,
        max_vio_global=[0.041, 0.072, 0.123, 0.054, 0.065, 0.216],
        acceptance=0.584,
        agreement=0.551,
        tokens_per_forward=1.58,
        plain_tokens_per_second=143.2,
        speculative_tokens_per_second=188.9,
        seconds=331.0,
        tokens=2_506_752,
        machine="2 CPU cores, torch 2.13.0, bfloat16",
        continuations=(Continuation(f"Lib/{HOSTILE}.py", f"def f():\n{HOSTILE}", tokens, 1.53),),
    )


def page(report: DemoReport, folder: Path) -> ElementTree.Element:
    """The written page, through a strict parser."""
    path = folder / "report.html"
    write_html(report, path)
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def printed(report: DemoReport, width: int = 80) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    return out.getvalue()


def test_the_page_contains_every_figure(tmp_path: Path) -> None:
    text = words(page(example(), tmp_path))
    expected = ["1.354", "2.219", "1.998", "5m31s", "2,506,752", "58.4%", "55.1%", "1.58", "143.2", "188.9", "1.32×"]
    expected += ["1,344 bytes", "6,144", "21.9%", "70,272 bytes", "4,997,120"]  # caches: this model's, the 671B one's
    expected += ["39% fewer bits than gzip", "32% fewer bits than xz", "6.3M of 12.2M", "kv_lora_rank", "make demo"]
    # Routers: 400 tokens where the mean is 175 at first, level at the last.
    expected += ["layer 31.290.000.12", "MTP module 11.290.000.22", "worst layer 1.29 at step 1, 0.00 at step 8"]
    assert [number for number in expected if number not in text] == []


def test_a_model_worse_than_the_compressors_is_reported_as_worse(tmp_path: Path) -> None:
    text = words(page(replace(example(), bits_per_byte=4.438), tmp_path))
    assert "100% more bits than gzip" in text and "fewer bits" not in text


def test_the_page_is_self_contained_and_its_figures_are_labelled(tmp_path: Path) -> None:
    root = page(example(), tmp_path)
    tags = {element.tag.removeprefix(XHTML) for element in root.iter()}
    assert tags.isdisjoint({"script", "link", "img", "iframe"})
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in source and "@import" not in source and " src=" not in source
    figures = [svg for svg in root.iter(f"{XHTML}svg") if svg.get("role") == "img"]
    assert len(figures) == 3 + 6 + 1  # charts, a strip for each router, bars
    assert all(svg.get("aria-label") and svg.findtext(f"{XHTML}title") for svg in figures)
    headings = [element.tag[-1] for element in root.iter() if element.tag in {f"{XHTML}h{n}" for n in range(1, 7)}]
    assert headings[0] == "1" and headings.count("1") == 1
    assert all(int(after) <= int(before) + 1 for before, after in pairwise(headings))


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    root = page(replace(example(), corpus=HOSTILE, machine=HOSTILE, model_directory=HOSTILE), tmp_path)
    assert root.find(f".//{XHTML}script") is None
    harmless = '<script>alert("1")</script> & \'\ufffd\ufffd[31m\ufffd]]>'
    marks = [mark.text for mark in root.iter(f"{XHTML}mark")]
    assert marks[-2:] == [" self", harmless]
    assert [heading.text for heading in root.iter(f"{XHTML}h3")].count(f"Lib/{harmless}.py") == 1
    assert root.findtext(f".//{XHTML}span[@class='prompt']") == f"def f():\n{harmless}"
    assert "<script" in printed(replace(example(), corpus=HOSTILE.replace("\ud800", "")))


@given(st.text(st.characters(codec=None)))
def test_any_text_survives_a_strict_parser(text: str) -> None:
    root = ElementTree.fromstring(f"<p>{_text(text)}</p>".encode())
    assert len(root.text or "") == len(text)


def test_one_step_is_enough(tmp_path: Path) -> None:
    report = example()
    root = page(replace(report, metrics=metrics(1), loads=report.loads[:1]), tmp_path)
    assert "Nothing was recorded" not in words(root)


def test_an_empty_run_is_reported_as_such(tmp_path: Path) -> None:
    report = replace(example(), metrics=[], loads=[], max_vio_global=[], continuations=())
    text = words(page(report, tmp_path))
    assert text.count("Nothing was recorded") == 3 + 6 + 1  # the charts, each router's strip, the table of MaxVio
    assert "No continuations were made" in text
    assert "no loads recorded" in printed(report)


def test_losses_that_were_not_finite_are_gaps(tmp_path: Path) -> None:
    rows = metrics(4)
    rows[1]["loss"] = None
    assert "the next token from 8 at 1 to 2 at 4" in str(
        [svg.get("aria-label") for svg in page(replace(example(), metrics=rows), tmp_path).iter(f"{XHTML}svg")]
    )


def without_mtp() -> DemoReport:
    report = example()
    config = replace(report.config, num_nextn_predict_layers=0)
    loads = [(step, tokens_per_expert_LE[:-1]) for step, tokens_per_expert_LE in report.loads]
    return replace(report, config=config, loads=loads, max_vio_global=report.max_vio_global[:-1])


def without_experts() -> DemoReport:
    report = without_mtp()
    config = replace(report.config, first_k_dense_replace=report.config.num_hidden_layers)
    return replace(report, config=config, loads=[(1, []), (8, [])], max_vio_global=[])


def test_without_mtp_modules_the_page_mentions_no_drafts(tmp_path: Path) -> None:
    text = words(page(without_mtp(), tmp_path))
    assert "This model has no MTP module" in text
    assert "58.4%" not in text and "accepted draft" not in text and "(MTP)" not in text


def test_without_moe_layers_there_is_nothing_to_balance(tmp_path: Path) -> None:
    text = words(page(without_experts(), tmp_path))
    assert "This model has no MoE layers, so there is nothing to balance" in text
    assert "no MoE layers: every token passes through all" in text


@pytest.mark.parametrize("make", [example, without_mtp, without_experts])
def test_the_terminal_report_fits_80_columns(make: Any) -> None:
    report = make()
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 80
    assert all(number in text for number in ("1.354", "2.219", "1.998", "1,344", "6,144", "21.9%"))
    assert ("58.4%" in text) == (report.config.num_nextn_predict_layers > 0)
