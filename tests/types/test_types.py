"""A type checker reads a script of a user and all public names, and finds nothing; and it finds what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mha_book

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def complaints(*paths: Path) -> list[str]:
    "What the checker says of these files, by rule."
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    config = json.loads((ROOT / "pyrightconfig.json").read_text(encoding="utf8"))
    config |= {"include": [str(path) for path in paths], "extraPaths": [str(ROOT)]}
    (paths[0].parent / "checked.json").write_text(json.dumps(config))
    try:
        done = subprocess.run(
            [*command, "--project", paths[0].parent / "checked.json"], capture_output=True, text=True, cwd=ROOT
        )
        report = json.loads(done.stdout)
    finally:
        (paths[0].parent / "checked.json").unlink()
    assert report["summary"]["filesAnalyzed"] == len(paths), done.stderr
    return [one.get("rule", one["message"]) for one in report["generalDiagnostics"] if one["severity"] == "error"]


def test_a_users_script_and_all_public_names_pass():
    assert complaints(HERE / "user_script.py", HERE / "public_surface.py") == []


def test_every_public_name_is_read():
    text = (HERE / "public_surface.py").read_text(encoding="utf8") + (HERE / "user_script.py").read_text("utf8")
    assert [name for name in mha_book.__all__ if name not in text] == []


WRONG = {
    "heads in words": 'MultiHeadAttention(64, "four")',
    "an attend that gives nothing": "def f(q, k, v, *, mask, bias, is_causal, dropout_p) -> None: ...\n"
    "MultiHeadAttention(64, 4, attend=f)",
    "a position without offset": "def f(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]: return q, k\n"
    "MultiHeadAttention(64, 4, position=f)",
    "a finish of one argument": "def f(heads: Tensor) -> Tensor: return heads\nMultiHeadAttention(64, 4, finish=f)",
    "a mask by torch's name": "MultiHeadAttention(64, 4).forward(torch.ones(1, 2, 64), padding=None)",
    "a cache that keeps nothing": "MultiHeadAttention(64, 4).forward(torch.ones(1, 2, 64), cache={})",
}


@pytest.mark.parametrize("code", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_reported(tmp_path, code):
    path = tmp_path / "wrong.py"
    path.write_text(f"import torch\nfrom torch import Tensor\nfrom mha_book import MultiHeadAttention\n\n{code}\n")
    assert complaints(path)
