"""`make repository` fills in the repository's address everywhere, any number of times."""

import json
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_ext"))
import repository  # noqa: E402

FIRST, SECOND = "https://github.com/some-one/mha-book", "https://github.com/Another-One/attention.book"


@pytest.fixture
def project(tmp_path) -> Path:
    "A copy of the files that the step changes, with one notebook more, which loads a model."
    for name in ("settings.ini", "CITATION.cff", "_config.yml", "models.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    for path in (ROOT / "nbs").glob("*.ipynb"):
        shutil.copy(path, tmp_path / "nbs")
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": ["load_minilm()"]}
    (tmp_path / "nbs" / "50_model.ipynb").write_text(json.dumps({"cells": [cell], "nbformat": 4}))
    return tmp_path


def snapshot(project: Path) -> dict[str, str]:
    "The text of every file, by path."
    files = (path for path in project.rglob("*.*") if path.is_file())
    return {path.relative_to(project).as_posix(): path.read_text(encoding="utf8") for path in files}


def cells(project: Path, name: str) -> list[dict]:
    return json.loads((project / "nbs" / name).read_text(encoding="utf8"))["cells"]


def test_twice_is_once(project):
    repository.configure(project, FIRST)
    once = snapshot(project)
    repository.configure(project, FIRST + ".git")
    assert snapshot(project) == once


def test_another_address_replaces_the_first(project):
    repository.configure(project, SECOND)
    direct = snapshot(project)
    repository.configure(project, FIRST)
    assert "Another-One" not in "".join(snapshot(project).values())
    repository.configure(project, SECOND)
    assert snapshot(project) == direct


def test_settings_are_filled(project):
    repository.configure(project, SECOND)
    parser = ConfigParser(interpolation=None)
    parser.read(project / "settings.ini", encoding="utf8")
    values = parser["DEFAULT"]
    assert (values["user"], values["repo"], values["git_url"]) == ("Another-One", "attention.book", SECOND)
    assert values["doc_host"] + values["doc_baseurl"] == "https://another-one.github.io/attention.book"


def test_buttons_appear(project):
    yaml = pytest.importorskip("yaml")
    repository.configure(project, FIRST)
    config = yaml.safe_load((project / "_config.yml").read_text(encoding="utf8"))
    assert config["repository"] == {"url": FIRST, "path_to_book": "nbs", "branch": "main"}
    assert config["launch_buttons"] == {"colab_url": "https://colab.research.google.com"}
    assert config["html"]["use_repository_button"] is config["html"]["use_edit_page_button"] is True
    assert config["html"]["baseurl"] == "https://some-one.github.io/mha-book/"
    citation = yaml.safe_load((project / "CITATION.cff").read_text(encoding="utf8"))
    assert citation["repository-code"] == FIRST and citation["authors"]


def test_notebooks_get_one_first_cell_and_keep_the_rest(project):
    names = [path.name for path in (project / "nbs").glob("*.ipynb")]
    before = {name: [cell for cell in cells(project, name) if cell["id"] != "colab"] for name in names}
    repository.configure(project, FIRST)
    for name in names:
        first, *rest = cells(project, name)
        source = "".join(first["source"])
        assert source.startswith("#| hide\n") and f"git clone --quiet --depth 1 {FIRST} " in source
        assert rest == before[name]
        code = "".join("".join(cell["source"]) for cell in rest if cell["cell_type"] == "code")
        assert ("models.txt" in source) == bool(re.search("load_(minilm|smollm2)|package_file", code)), name


@pytest.mark.parametrize(
    "address",
    [
        "",
        "github.com/a/b",
        "http://github.com/a/b",
        "https://github.com/a",
        "https://example.org/a/b",
        "https://github.com/a/b/tree/main",
        "https://github.com/-a/b",
        "https://github.com/a/b c",
    ],
)
def test_other_addresses_are_refused(project, address):
    before = snapshot(project)
    with pytest.raises(ValueError, match="OWNER/REPOSITORY"):
        repository.configure(project, address)
    assert snapshot(project) == before
