"""The README's examples run, one after the other, and print what their comments say."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf8")


def test_the_examples_run():
    code = "".join(re.findall(r"```python\n(.*?)```", README, re.S))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([2, 10, 512]) torch.Size([2, 8, 10, 10])" in printed.getvalue()
    assert re.search(r"head +q +k +v +o\n( +\d( +\S+e-\d+){4}\n){8}", printed.getvalue())


def test_every_link_leads_somewhere():
    root = Path(__file__).resolve().parents[2]
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets and not [target for target in targets if not (root / target).exists()]
