"""The proof on random weights: what it does with folders. (The proof itself takes minutes: it is run by hand.)"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import prove_published


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prove_published, "prove", lambda options: {"passed": True})

    def run(*arguments: str | Path) -> object:
        monkeypatch.setattr(sys, "argv", ["prove_published.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as raised:
            prove_published.main()
        return raised.value.code

    return run


def test_a_folder_of_somebody_else_is_not_emptied(command, tmp_path: Path) -> None:
    mine = tmp_path / "thesis.txt"
    mine.write_text("precious")
    assert "not empty" in str(command("--work", tmp_path))
    assert "not empty" in str(command("--work", mine))
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("keep", [True, False])
def test_the_report_outlives_the_folder(command, tmp_path: Path, keep: bool) -> None:
    work = tmp_path / "proof"
    report = work / "report.json"
    for _ in range(2):  # the second time, into the folder of the first
        assert command("--work", work, "--report", report, *(["--keep"] if keep else [])) == 0
        assert json.loads(report.read_text()) == {"passed": True}
        if not keep:
            assert [path.name for path in work.iterdir()] == ["report.json"]
            report.unlink()
