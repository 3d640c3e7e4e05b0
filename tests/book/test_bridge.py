"""What the book makes of nbdev's `#|` directives, and when it runs a notebook again."""

import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_ext"))
import nbdev_bridge as bridge  # noqa: E402


def notebook(*sources: str) -> str:
    "A notebook of these code cells, as text."
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells))


def page(source: str):
    "A cell as the book sees it, between the two of the stamp."
    _, cell, _ = bridge.read_nb(notebook(source)).cells
    return cell


@pytest.mark.parametrize(
    "source, tags",
    [
        ("x = 1", []),
        ("#| export\nx = 1", []),
        ("#| hide\nx = 1", ["remove-cell"]),
        ("#| default_exp name", ["remove-cell"]),
        ("#| code-fold: true\nx = 1", ["hide-input"]),
        ('#| code-fold: true\n#| code-summary: "Solution"\nx = 1', ["hide-cell"]),
        ("#| echo: false\nx = 1", ["remove-input"]),
        ("#| output: false\nx = 1", ["remove-output"]),
        ("#| proof: one is one\nassert 1 == 1", ["hide-input", "proof"]),
        ("#| setup\nimport torch", ["hide-input"]),
        ("#| eval: false\nx = 1", ["skip-execution"]),
        ("#| slow\nx = 1", ["skip-execution"]),
        ("import nbdev; nbdev.nbdev_export()", ["remove-cell", "skip-execution"]),
    ],
)
def test_directives_become_tags(source, tags):
    assert page(source).metadata.get("tags", []) == tags


def test_setup_cells_in_a_row_are_one_fold():
    sources = "#| export\n#| setup\nimport a", "#| setup\nimport b", "x = 1", "#| setup\nimport c"
    _, one, two, three, _ = bridge.read_nb(notebook(*sources)).cells
    assert [cell.source for cell in (one, two, three)] == ["import a\n\nimport b", "x = 1", "import c"]
    assert one.metadata["mystnb"] == {"code_prompt_show": "Setup", "code_prompt_hide": "Setup"}


def test_a_proof_ends_with_its_mark_and_carries_its_sentence():
    cell = page("#| proof: one is one,\n#|   and stays one\nassert 1 == 1")
    assert cell.source.splitlines() == ["assert 1 == 1", '__import__("page_stamp").proved()']
    assert cell.metadata["mystnb"]["code_prompt_show"] == "one is one, and stays one"


def test_asked_for_flags_run(monkeypatch):
    monkeypatch.setenv("MHA_BOOK_FLAGS", "slow")
    assert "tags" not in page("#| slow\nx = 1").metadata


def test_figure_options():
    cell = page("#| label: fig-a\n#| fig-cap: It rises,\n#|   and falls: at 3.\n#| fig-alt: 'A curve'\nplot()")
    assert cell.source == "plot()"
    assert cell.metadata["mystnb"] == {
        "figure": {"name": "fig-a", "caption": "It rises, and falls: at 3."},
        "image": {"alt": "A curve"},
    }
    assert page("#| fig-alt: A curve\nplot()").metadata["mystnb"] == {"image": {"alt": "A curve"}}


def test_only_leading_directives_count():
    assert page("x = 1\n#| hide").source == "x = 1\n#| hide"
    assert page("# a comment\n#| hide\nx = 1").metadata.get("tags", []) == []


def test_changed_package_is_another_notebook(monkeypatch, tmp_path):
    def kernelspec():
        return bridge.read_nb(notebook("x = 1")).metadata["kernelspec"]["mha_book"]

    for name in ("mha_book/a.py", "nbs/measured/a.json", "_ext/page_stamp.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text(encoding="utf8"), encoding="utf8")
    monkeypatch.setattr(bridge, "ROOT", tmp_path)
    seen = {kernelspec()}
    for name in ("mha_book/a.py", "nbs/measured/a.json", "_ext/page_stamp.py"):
        (tmp_path / name).write_text("1")
        seen.add(kernelspec())
    assert len(seen) == 4 and kernelspec() in seen
