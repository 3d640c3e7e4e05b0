"""How the runner of the notebooks ends when it is stopped, or when nobody reads what it prints."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_ext"))
import run_notebooks as runner  # noqa: E402


def test_ctrl_c_is_one_line_and_130(monkeypatch, capsys):
    def stopped(names):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "main", stopped)
    assert runner.main_to_the_end([]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C; the notebooks that ran are kept\n"


def test_a_reader_who_has_left_is_one_line_and_141(monkeypatch, capsys):
    end, start = os.pipe()
    os.close(end)
    monkeypatch.setattr(runner, "main", lambda names: print("a line", flush=True))
    with open(start, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert runner.main_to_the_end([]) == 141
    assert capsys.readouterr().err == "stopped, for nobody reads the output any more; the notebooks that ran are kept\n"


def test_a_run_is_kept_before_anybody_is_told(monkeypatch, tmp_path):
    "So that a line which nobody reads does not lose it."
    kept = []
    monkeypatch.setattr(runner, "keep", lambda cache, path, nb, seconds: kept.append(path.name))
    monkeypatch.setattr("builtins.print", lambda *words, **options: kept.append("told"))
    assert runner.report(None, "[1/2]", tmp_path / "a.ipynb", None, 1.0, "") == []
    assert runner.report(None, "[2/2]", tmp_path / "b.ipynb", None, 1.0, "it failed") == ["it failed"]
    assert kept == ["a.ipynb", "told", "told"]
