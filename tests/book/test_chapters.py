"""The form of a chapter: idea before code, proofs and setup folded, numbers in tables, exercises with solutions."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_ext"))
import nbdev_bridge as bridge  # noqa: E402

CHAPTERS = sorted((ROOT / "nbs").glob("[0-8]*.ipynb"))
OPEN_LINES, PROSE_SHARE, WORDS = 150, 0.55, 3000
CLOSED = {"hide", "code-fold", "proof", "setup", "default_exp", "echo", "hide_input"}
OPENING = re.compile(r"^\*\*For\*\* .*\*\*Needs\*\* .*\*\*Time\*\* .*\d+ minutes.*\d+", re.M | re.S)
SECTIONS = "## In your own code", "## Your turn", "## Recap"
HINT = re.compile(r"^:{3,}\{dropdown\} Hint", re.M)
ALIGNED = re.compile(r"print\(.*\{[^{}]*:[<>^]?\d", re.S)


def read(cells: list[dict]) -> tuple[list[str], list[tuple[dict[str, str], str]]]:
    "The texts of a notebook's cells, and its code cells: their directives, and the code."
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return (
        [source for kind, source in sources if kind == "markdown"],
        [bridge.split_directives(source) for kind, source in sources if kind == "code"],
    )


def is_solution(found: dict[str, str]) -> bool:
    return found.get("code-summary", "").startswith("Solution")


def sizes(cells: list[dict]) -> tuple[int, float, int]:
    "Open lines of code, the share of prose in what stands open, and the words of prose."
    texts, code = read(cells)
    shown = [body for found, body in code if not CLOSED & found.keys()]
    lines = [line for body in shown for line in body.splitlines() if line.strip()]
    prose, words = sum(len(text.split()) for text in texts), sum(len(line.split()) for line in lines)
    return len(lines), prose / max(1, prose + words), prose


def wrong_size(cells: list[dict]) -> list[str]:
    lines, share, words = sizes(cells)
    faults = [f"{lines} open lines of code, {OPEN_LINES} at most"] if lines > OPEN_LINES else []
    faults += [f"{share:.2f} of what stands open is prose, {PROSE_SHARE} at least"] if share < PROSE_SHARE else []
    return faults + ([f"{words} words, {WORDS} at most"] if words > WORDS else [])


def wrong_frame(cells: list[dict]) -> list[str]:
    "What a page lacks of its opening and its end."
    texts, _ = read(cells)
    whole = "\n\n".join(texts)
    faults = [] if re.search(r"^> \S", texts[0], re.M) else ["no claim under the title"]
    faults += [] if OPENING.search(whole) else ["no line that begins with **For**, and has **Needs** and **Time**"]
    places = [whole.find(section) for section in SECTIONS]
    faults += [f"no section {section}" for section, place in zip(SECTIONS, places) if place < 0]
    return faults + (["the sections at the end are in another order"] if places != sorted(places) else [])


def wrong_folds(cells: list[dict]) -> list[str]:
    "Setup in more than one fold, proofs without a sentence, tests that are no proof."
    _, code = read(cells)
    setups = ["setup" in found for found, _ in code]
    runs = sum(now and not before for before, now in zip([False, *setups], setups))
    faults = [] if runs == 1 else [f"{runs} folds of setup"]
    for found, body in code:
        first = next((line for line in body.splitlines() if line.strip()), "")
        if re.search(r"^def test_", body, re.M) and not {"proof", "export", "hide"} & found.keys():
            faults.append(f"a test that is no proof: {first}")
        if "proof" in found and (len(found["proof"].split()) < 3 or found["proof"].endswith(".")):
            faults.append(f"a proof without a sentence, or with a full stop behind it: {found['proof']!r}")
        if "proof" in found and "assert" not in body:
            faults.append(f"a proof that asserts nothing: {first}")
    return faults


def wrong_exercises(cells: list[dict]) -> list[str]:
    "Solutions without hints, and no bug hunt."
    texts, code = read(cells)
    solutions, hints = sum(is_solution(found) for found, _ in code), sum(len(HINT.findall(text)) for text in texts)
    faults = [] if hints >= solutions > 0 else [f"{hints} hints for {solutions} solutions"]
    faults += [] if any("Bug hunt" in text for text in texts) else ["no bug hunt"]
    lazy = [body for found, body in code if is_solution(found) and "assert" not in body]
    return faults + [f"a solution that nothing checks: {body.splitlines()[:1]}" for body in lazy]


def wrong_outputs(cells: list[dict]) -> list[str]:
    "Numbers as printed text, and figures without a text."
    _, code = read(cells)
    faults = [f"a printed table: {body.splitlines()[0]}" for _, body in code if ALIGNED.search(body)]
    for found, _ in code:
        if "label" in found and found["label"].startswith("fig-") and not {"fig-cap", "fig-alt"} <= found.keys():
            faults.append(f"{found['label']} lacks a caption or a text")
    return faults


CHECKS = wrong_size, wrong_frame, wrong_folds, wrong_exercises, wrong_outputs


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_the_form_of_one(path, check):
    assert check(json.loads(path.read_text(encoding="utf8"))["cells"]) == []


# Each of these checks can fail

GOOD = [
    ("markdown", "# Title\n\n*In the field's words.*\n\n> The claim."),
    (
        "markdown",
        "**For** whoever asks. **Needs** [1](01_one). **Time** 9 minutes; 25 for all.\n\n" + "word " * 90,
    ),
    ("code", "#| export\n#| setup\nimport a"),
    ("code", "#| setup\nimport b"),
    ("code", "#| proof: one is one, exactly\ndef test_one():\n    assert 1 == 1\n\ntest_one()"),
    ("code", "#| label: fig-one\n#| fig-cap: A.\n#| fig-alt: B.\nplot()"),
    ("markdown", "## In your own code\n\n## Your turn\n\n**Bug hunt.** Find it.\n\n:::{dropdown} Hint\nLook.\n:::"),
    ("code", '#| code-fold: true\n#| code-summary: "Solution"\nassert 1 == 1'),
    ("markdown", "## Recap"),
]


def notebook(changed: dict[int, str]) -> list[dict]:
    "The good page with some cells changed; a cell changed to nothing is taken out."
    cells = [(kind, changed.get(i, source)) for i, (kind, source) in enumerate(GOOD)]
    return [dict(cell_type=kind, source=source) for kind, source in cells if source]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_page_in_good_form_passes(check):
    assert check(notebook({})) == []


@pytest.mark.parametrize(
    "check, changed",
    [
        (wrong_size, {2: "x = 1\n" * 151}),
        (wrong_size, {2: "a b c d e f g h i j\n" * 20}),
        (wrong_size, {8: "word " * 3001}),
        (wrong_frame, {0: "# Title"}),
        (wrong_frame, {1: "For whoever asks."}),
        (wrong_frame, {8: ""}),
        (wrong_frame, {6: "## Your turn\n\n## In your own code"}),
        (wrong_folds, {4: "#| proof: one is one, exactly\nassert 1", 5: "#| setup\nimport c"}),
        (wrong_folds, {2: "", 3: ""}),
        (wrong_folds, {4: "def test_one():\n    assert 1 == 1"}),
        (wrong_folds, {4: "#| proof: one\nassert 1"}),
        (wrong_folds, {4: "#| proof: one is one, exactly.\nassert 1"}),
        (wrong_folds, {4: "#| proof: one is one, exactly\nprint(1)"}),
        (wrong_exercises, {6: "**Bug hunt.** Find it."}),
        (wrong_exercises, {6: ":::{dropdown} Hint\nLook.\n:::"}),
        (wrong_exercises, {7: ""}),
        (wrong_exercises, {7: '#| code-fold: true\n#| code-summary: "Solution"\nprint(1)'}),
        (wrong_outputs, {5: "#| label: fig-one\n#| fig-cap: A.\nplot()"}),
        (wrong_outputs, {7: 'print(f"{name:10}{value:>8}")'}),
    ],
)
def test_each_fault_of_form_is_seen(check, changed):
    assert check(notebook(changed)) != []
