"""A judge that is absent skips its tests on a developer's machine, and fails them in CI."""

import pytest

from tests.conftest import fail_absent_judge


@pytest.mark.parametrize(
    ("node", "ci", "outcome"),
    [
        ("tests/oracle/test_llama.py::test_drafts", "true", "failed"),
        ("tests/serve/test_page.py", "true", "failed"),
        ("tests/oracle/test_llama.py::test_drafts", "", "skipped"),
        ("tests/runtime/test_cpp.py::test_kernels", "true", "skipped"),
    ],
)
def test_absent_judges(node: str, ci: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", ci)
    report = pytest.CollectReport(node, "skipped", ("file", 1, "Skipped: not there"), [])
    fail_absent_judge(report)
    assert report.outcome == outcome and "not there" in str(report.longrepr)


def test_what_ran_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    for outcome in ("passed", "failed"):
        report = pytest.CollectReport("tests/oracle/test_mtp.py", outcome, None, [])
        fail_absent_judge(report)
        assert report.outcome == outcome
