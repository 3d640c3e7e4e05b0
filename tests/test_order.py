"""The rooms stand in an order, import order is reading order, modules stay small, and the import costs little."""

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
# A folder imports only folders that stand before it here, and plugs and instruments do not know each other.
FOLDERS = ["heads", "kernels", "plugs", "variants", "instruments", "models", "lab", "bench"]
STRANGERS = {("plugs", "instruments"), ("instruments", "plugs")}
HELPERS = 90  # notebooks from here on serve the chapters, and are imported by none of them ...
EXCEPTIONS = {("instruments.check", "instruments.testing")}  # ... but for this one
# ... and for this one: it imports nothing of the package, and is the only place for what torch does not promise.
FOR_EVERYBODY = {"kernels.torch_private"}
# Notebook and module share a name wherever both are good names for it.
OTHER_NAMES = {
    "02_multi_head": "head_list",
    "04a_layouts": "dialects",
    "10b_decoding": "cache_size",
    "12b_softmax": "merging",
    "21_pretrained": "encoder",
    "99_api": "__init__",
}
LIMITS = {"function": 20, "class": 80, "module": 300}
# One idea each, with long signatures, or with tables of others' names; what they are now is as long as they may be.
LONGER = {
    "figures": 355,
    "heads.dialects": 319,
    "heads.layer.MultiHeadAttention": 100,
    "heads.layer": 395,
    "heads.single_head": 374,
    "plugs.cache.KVCache": 139,
    "plugs.cache": 550,
    "plugs.paged.PagedCache": 97,
    "plugs.paged": 400,
    "variants.mixed_precision": 313,
}
HEAVY = ("matplotlib", "triton")
MODULES_BEYOND_TORCH = 60  # how many modules of others `import mha_book` may load on top of torch's own two thousand


# Which module comes from which notebook


def exported_name(notebook: Path) -> str | None:
    "What the notebook's `#| default_exp` says, `heads.layer` for instance."
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = (re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M) for source in sources)
    return next((match[1] for match in found if match), None)


def places(folder: Path) -> dict[str, str]:
    "The file name of each module's notebook; sorted, these are the reading order."
    return {
        exported_name(path): path.stem for path in sorted(folder.glob("[0-9][0-9]*_*.ipynb")) if exported_name(path)
    }


def misnamed(folder: Path) -> list[str]:
    "Notebooks NN_name.ipynb or NNa_name.ipynb that export another module than `name`, in whichever folder."
    return [
        stem
        for module, stem in places(folder).items()
        if module.rpartition(".")[2] != OTHER_NAMES.get(stem, stem.split("_", 1)[1])
    ]


def write_notebook(path: Path, module: str) -> None:
    "A notebook with nothing in it but its directive."
    cell = {"cell_type": "code", "source": [f"#| default_exp {module}\n"]}
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# T"]}, cell]}))


def test_notebooks_export_the_module_they_are_named_after():
    assert misnamed(ROOT / "nbs") == []


def test_misnamed_notebook_is_seen(tmp_path):
    write_notebook(tmp_path / "01_head.ipynb", "heads.head")
    write_notebook(tmp_path / "02b_heads.ipynb", "heads.many")
    write_notebook(tmp_path / "99_api.ipynb", "__init__")
    assert misnamed(tmp_path) == ["02b_heads"]
    assert places(tmp_path) == {"heads.head": "01_head", "heads.many": "02b_heads", "__init__": "99_api"}


# Who imports whom


def modules(package: Path) -> list[str]:
    "All modules of the package by their dotted names; nbdev's index and the folders' own files apart."
    names = (path.relative_to(package).with_suffix("").as_posix().replace("/", ".") for path in package.rglob("*.py"))
    return sorted(name for name in names if name != "_modidx" and not name.endswith(".__init__"))


def own_imports(source: str, name: str, known) -> set[str]:
    "The package's own modules that module `name` imports, at its top or inside a function."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = ["mha_book", *name.split(".")[:-1]]  # the folder that one dot means
            base = ".".join(inside[: len(inside) + 1 - node.level]) if node.level else ""
            names = [".".join(filter(None, (base, node.module, alias.name))) for alias in node.names]
        else:
            continue
        for parts in (full.split(".")[1:] for full in names if full.split(".")[0] == "mha_book"):
            module = next((".".join(parts[:k]) for k in range(len(parts), 0, -1) if ".".join(parts[:k]) in known), None)
            found.add(module or "__init__")
    return found


def room(module: str) -> int:
    "The place of a module's folder; what stands beside the folders comes after all of them."
    folder = module.rpartition(".")[0]
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


def is_wrong(name: str, other: str, place: dict[str, str]) -> bool:
    "Whether module `name` must not import module `other`."
    folders = name.rpartition(".")[0], other.rpartition(".")[0]
    if folders in STRANGERS or room(other) > room(name) or (name, other) in EXCEPTIONS:
        return (name, other) not in EXCEPTIONS
    if other in FOR_EVERYBODY:
        return False
    here, there = place.get(name), place.get(other)  # a plain module has no notebook
    if here is None or there is None:
        return False
    helper = int(here[:2]) < HELPERS <= int(there[:2])
    return helper or room(other) == room(name) and there >= here


def out_of_order(package: Path, place: dict[str, str]) -> list[str]:
    "Imports of a folder further down, of what the reader has not read yet, and a chapter's imports of helpers."
    known = modules(package)
    imports = {
        name: own_imports((package / f"{name.replace('.', '/')}.py").read_text(encoding="utf8"), name, known)
        for name in known
    }
    return [
        f"{name} imports {other}"
        for name in known
        for other in sorted(imports[name])
        if name != "__init__" and is_wrong(name, other, place)
    ] + circles(imports)


def circles(imports: dict[str, set[str]]) -> list[str]:
    "Modules that come back to themselves, import by import."

    def reached(name, seen):
        for other in imports.get(name, set()) - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    return [f"{name} imports itself, by way of others" for name in imports if name in reached(name, set())]


def test_import_order_is_reading_order():
    assert out_of_order(PACKAGE, places(ROOT / "nbs")) == []


def test_every_folder_of_the_package_has_a_place():
    assert {module.rpartition(".")[0] for module in modules(PACKAGE)} == {"", *FOLDERS}
    assert {module for module in modules(PACKAGE) if "." not in module} == {"__init__", "figures"}


PLACE = {
    "heads.one": "01_one",
    "heads.two": "02a_two",
    "heads.twice": "02b_twice",
    "plugs.plug": "10_plug",
    "instruments.check": "25_check",
    "instruments.testing": "91_testing",
    "kernels.kernel": "07_kernel",
    "kernels.torch_private": "91_torch_private",
    "lab.proof": "22_proof",
    "bench.first": "91_first",
    "__init__": "99_api",
}


@pytest.mark.parametrize(
    "name, source, caught",
    [
        ("heads.two", "from .one import f", False),
        ("heads.two", "import mha_book.heads.one", False),
        ("heads.twice", "from .two import f", False),
        ("plugs.plug", "from ..heads.one import f", False),
        ("lab.proof", "from ..plugs import plug", False),
        ("instruments.check", "from .testing import f", False),
        ("bench.first", "from ..instruments.testing import f", False),
        ("kernels.kernel", "from .torch_private import f", False),
        ("plugs.plug", "from ..kernels.torch_private import f", False),
        ("heads.one", "from ..kernels.torch_private import f", True),
        ("kernels.torch_private", "from .kernel import f\nfrom ..plugs import plug", True),
        ("heads.two", "from .twice import f", True),
        ("heads.one", "from .two import f", True),
        ("heads.one", "def g():\n    from mha_book.heads.two import f", True),
        ("heads.one", "from . import two", True),
        ("heads.one", "from ..plugs.plug import f", True),
        ("plugs.plug", "from ..lab import proof", True),
        ("plugs.plug", "from ..instruments.check import f", True),
        ("instruments.check", "from mha_book.plugs.plug import f", True),
        ("instruments.testing", "from .check import f", False),
        ("lab.proof", "from ..instruments.testing import f", True),
        ("heads.one", "from mha_book import f", True),
        ("heads.one", "import mha_book", True),
        ("bench.first", "from .. import f", True),
    ],
)
def test_bad_order_is_seen(tmp_path, name, source, caught):
    for module in PLACE:
        path = tmp_path / f"{module.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source if module == name else "import torch\n")
    assert bool(out_of_order(tmp_path, PLACE)) == caught


def test_a_circle_of_plain_modules_is_seen(tmp_path):
    (tmp_path / "bench").mkdir()
    for name, other in zip("abc", "bca"):
        (tmp_path / "bench" / f"{name}.py").write_text(f"from .{other} import f\n")
    assert len(out_of_order(tmp_path, {})) == 3
    (tmp_path / "bench" / "c.py").write_text("import torch\n")
    assert out_of_order(tmp_path, {}) == []


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
    lines, kinds = (
        code_lines(source),
        {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"},
    )
    sizes = [("module", name, len(lines))]
    for node in ast.walk(ast.parse(source)):
        if kind := kinds.get(type(node)):
            first = node.lineno if kind == "class" else node.body[0].lineno
            sizes.append((kind, f"{name}.{node.name}", len(lines & set(range(first, node.end_lineno + 1)))))
    limits = {what: LONGER.get(what, LIMITS[kind]) for kind, what, _ in sizes}
    return [f"{kind} {what}: {size} lines of {limits[what]}" for kind, what, size in sizes if size > limits[what]]


@pytest.mark.parametrize("module", modules(PACKAGE))
def test_sizes(module):
    source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf8")
    assert too_large(source, module) == []


def body(lines: int, indent: str = "    ") -> str:
    "So many lines of code, with comments and blank lines between them that do not count."
    return "".join(f"{indent}# why\n\n{indent}x{i} = (\n{indent}  {i})\n" for i in range(lines // 2))


@pytest.mark.parametrize(
    "source, caught",
    [
        ('def f():\n    """Long\n\n    story."""\n' + body(20), None),
        ("def f(\n    a,  # first\n):\n" + body(20), None),
        ("def f():\n" + body(22), "function"),
        ("class C:\n    def f(self):\n" + body(22, " " * 8), "function"),
        ("class C:\n" + body(78), None),
        ("class C:\n" + body(80), "class"),
        (body(300, ""), None),
        (body(302, ""), "module"),
    ],
)
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


@pytest.mark.parametrize(
    "line, caught", [("import jaxtyping", False), ("import matplotlib", True), ("import torch._dynamo", True)]
)
def test_costly_import_is_seen(tmp_path, line, caught):
    (tmp_path / "mha_book").mkdir()
    (tmp_path / "mha_book" / "__init__.py").write_text(line + "\n")
    assert bool(costly(loaded_beyond_torch(tmp_path))) == caught


# What several test files use stands in tests/support


def borrowed(folder: Path) -> list[str]:
    "Which test files import another test file, at their top or inside a function."
    names = {path.stem for path in folder.rglob("test_*.py")}
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(alias.name for alias in node.names)]
            found += [f"{path.name} imports {name}" for name in modules if names & set(name.split("."))]
    return found


def test_no_test_file_imports_another():
    assert borrowed(ROOT / "tests") == []


@pytest.mark.parametrize(
    "line, caught",
    [
        ("from support.pairs import every_pair", False),
        ("import test_one", True),
        ("from test_one import helper", True),
        ("from heads.test_one import helper", True),
        ("def f():\n    from heads import test_one", True),
    ],
)
def test_a_borrowed_helper_is_seen(tmp_path, line, caught):
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "test_one.py").write_text("import torch\n")
    (tmp_path / "test_two.py").write_text(line + "\n")
    assert bool(borrowed(tmp_path)) == caught


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_are_found_in_every_folder(folder):
    "Lists that look at the package from above only would hold no module any more."
    assert any(module.startswith(f"{folder}.") for module in modules(PACKAGE))
