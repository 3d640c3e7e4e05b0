"""Import order is reading order, modules stay small, and importing the package costs little beyond torch."""
import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mha_book"
HELPERS = 90  # notebooks from here on serve the chapters, and are imported by none of them ...
EXCEPTIONS = {("check", "testing")}  # ... but for this one
LIMITS = {"function": 20, "class": 80, "module": 300}
HEAVY = ("matplotlib", "triton")
MODULES_BEYOND_TORCH = 60  # how many modules of others `import mha_book` may load on top of torch's own two thousand


# Which module comes from which notebook


def exported_name(notebook: Path) -> str | None:
    "What the notebook's `#| default_exp` says."
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = (re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M) for source in sources)
    return next((match[1] for match in found if match), None)


def numbers(folder: Path) -> dict[str, int]:
    "The number of each module's notebook."
    return {exported_name(path): int(path.name[:2]) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}


def misnamed(folder: Path) -> list[str]:
    "Notebooks NN_name.ipynb that export another module than `name` (99_api exports the package itself)."
    special = {"99_api": "__init__"}
    return [path.name for path in sorted(folder.glob("*.ipynb"))
            if exported_name(path) != special.get(path.stem, path.stem[3:])]


def write_notebook(path: Path, module: str) -> None:
    "A notebook with nothing in it but its directive."
    cell = {"cell_type": "code", "source": [f"#| default_exp {module}\n"]}
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# T"]}, cell]}))


def test_notebooks_export_the_module_they_are_named_after():
    assert misnamed(ROOT / "nbs") == []


def test_misnamed_notebook_is_seen(tmp_path):
    write_notebook(tmp_path / "01_head.ipynb", "head")
    write_notebook(tmp_path / "02_heads.ipynb", "many")
    write_notebook(tmp_path / "99_api.ipynb", "__init__")
    assert misnamed(tmp_path) == ["02_heads.ipynb"]
    assert numbers(tmp_path) == {"head": 1, "many": 2, "__init__": 99}


# Who imports whom


def own_imports(source: str, modules) -> set[str]:
    "The package's own modules that this source imports, at its top or inside a function."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("mha_book." if node.level else "") + (node.module or "")
            names = [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names if name.split(".")[0] == "mha_book"]
        found |= {part[1] if len(part) > 1 and part[1] in modules else "__init__" for part in parts}
    return found


def out_of_order(package: Path, number: dict[str, int]) -> list[str]:
    "Imports of a module that the reader has not read yet, and a chapter's imports of helpers."
    faults = []
    for name in sorted(number):
        for other in sorted(own_imports((package / f"{name}.py").read_text(encoding="utf8"), number)):
            later = (number[other], other) >= (number[name], name)  # those that share a number: by name
            helper = number[name] < HELPERS <= number[other]
            if (later or helper) and (name, other) not in EXCEPTIONS:
                faults.append(f"{number[name]:02}_{name} imports {number[other]:02}_{other}")
    return faults


def test_import_order_is_reading_order():
    assert out_of_order(PACKAGE, numbers(ROOT / "nbs")) == []


@pytest.mark.parametrize("name, source, caught", [
    ("two", "from .one import f", False),
    ("two", "import mha_book.one", False),
    ("two", "from .twice import f", False),
    ("twice", "from .two import f", True),
    ("check", "from .testing import f", False),
    ("testing", "from .check import f", False),
    ("one", "from .two import f", True),
    ("one", "def g():\n    from mha_book.two import f", True),
    ("one", "from . import two", True),
    ("one", "from mha_book import f", True),
    ("one", "import mha_book", True),
    ("two", "from .testing import f", True),
    ("testing", "from . import f", True),
])
def test_bad_order_is_seen(tmp_path, name, source, caught):
    number = {"one": 1, "twice": 2, "two": 2, "check": 25, "testing": 91, "__init__": 99}
    for module in number:
        (tmp_path / f"{module}.py").write_text(source if module == name else "import torch\n")
    assert bool(out_of_order(tmp_path, number)) == caught


# How much there is


def code_lines(source: str) -> set[int]:
    "The numbers of the lines that hold code: no docstrings, no blank lines, no lines with only a comment."
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(source))


def docstring_lines(tree: ast.AST) -> set[int]:
    "The numbers of the lines of all docstrings."
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node, False)]
    return {line for text in first for line in range(text.lineno, text.end_lineno + 1)}


def too_large(source: str, name: str) -> list[str]:
    "What in a module is longer than its limit. A signature, with a line an argument, is documentation: not counted."
    lines, kinds = code_lines(source), {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function",
                                        ast.ClassDef: "class"}
    sizes = [("module", name, len(lines))]
    for node in ast.walk(ast.parse(source)):
        if kind := kinds.get(type(node)):
            first = node.lineno if kind == "class" else node.body[0].lineno
            sizes.append((kind, f"{name}.{node.name}", len(lines & set(range(first, node.end_lineno + 1)))))
    return [f"{kind} {what}: {size} lines of {LIMITS[kind]}" for kind, what, size in sizes if size > LIMITS[kind]]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_sizes(path):
    if path.stem != "_modidx":  # nbdev's index
        assert too_large(path.read_text(encoding="utf8"), path.stem) == []


def body(lines: int, indent: str = "    ") -> str:
    "So many lines of code, with comments and blank lines between them that do not count."
    return "".join(f"{indent}# why\n\n{indent}x{i} = (\n{indent}  {i})\n" for i in range(lines // 2))


@pytest.mark.parametrize("source, caught", [
    ('def f():\n    """Long\n\n    story."""\n' + body(20), None),
    ("def f(\n    a,  # first\n):\n" + body(20), None),
    ("def f():\n" + body(22), "function"),
    ("class C:\n    def f(self):\n" + body(22, " " * 8), "function"),
    ("class C:\n" + body(78), None),
    ("class C:\n" + body(80), "class"),
    (body(300, ""), None),
    (body(302, ""), "module"),
])
def test_large_code_is_seen(source, caught):
    found = too_large(source, "m")
    assert [line.split()[0] for line in found] == ([caught] if caught else [])


# What importing the package loads

COUNT = """
import sys, torch
before = set(sys.modules)
import mha_book
print(*sorted(set(sys.modules) - before))
"""


def loaded_beyond_torch(folder: Path) -> list[str]:
    "The modules that `import mha_book`, from `folder`, loads after torch, its own apart."
    command = f"import sys; sys.path.insert(0, {str(folder)!r})" + COUNT
    done = subprocess.run([sys.executable, "-c", command], cwd=folder, check=True, capture_output=True, text=True)
    return [name for name in done.stdout.split() if name.split(".")[0] != "mha_book"]


def costly(modules: list[str]) -> list[str]:
    "What is wrong with loading these: heavy packages by name, or too many of any kind."
    faults = sorted({name for name in modules if name.split(".")[0] in HEAVY})
    many = [f"{len(modules)} modules"] if len(modules) > MODULES_BEYOND_TORCH else []
    return faults + many


def test_import_is_cheap():
    assert costly(loaded_beyond_torch(ROOT)) == []


@pytest.mark.parametrize("line, caught", [("import jaxtyping", False), ("import matplotlib", True),
                                          ("import torch._dynamo", True)])
def test_costly_import_is_seen(tmp_path, line, caught):
    (tmp_path / "mha_book").mkdir()
    (tmp_path / "mha_book" / "__init__.py").write_text(line + "\n")
    assert bool(costly(loaded_beyond_torch(tmp_path))) == caught
