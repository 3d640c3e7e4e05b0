"""Hands the metadata in settings.ini to setuptools."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

SUFFIX = "_requirements"


def settings() -> dict[str, str]:
    "The values of settings.ini, `%(name)s` filled in."
    parser = ConfigParser(delimiters=["="])
    parser.read(Path(__file__).parent / "settings.ini", encoding="utf8")
    return dict(parser["DEFAULT"])


def lines(text: str) -> list[str]:
    "The lines of a value that spans several."
    return [line.strip() for line in text.splitlines() if line.strip()]


def extras(values: dict[str, str]) -> dict[str, list[str]]:
    "Every `NAME_requirements` is the extra NAME."
    return {key.removesuffix(SUFFIX): lines(text) for key, text in values.items() if key.endswith(SUFFIX)}


def urls(values: dict[str, str]) -> dict[str, str]:
    "Links for the package's page, once the repository is configured."
    if not values["git_url"]:
        return {}
    return {"Source": values["git_url"], "Documentation": values["doc_host"] + values["doc_baseurl"] + "/"}


def classifiers(values: dict[str, str]) -> list[str]:
    "Trove classifiers that the settings decide."
    stages = ["Planning", "Pre-Alpha", "Alpha", "Beta", "Production/Stable", "Mature", "Inactive"]
    return [
        f"Development Status :: {values['status']} - {stages[int(values['status']) - 1]}",
        f"Intended Audience :: {values['audience']}",
        f"Natural Language :: {values['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ]


VALUES = settings()
setup(
    name=VALUES["lib_name"],
    version=VALUES["version"],
    description=VALUES["description"],
    author=VALUES["author"],
    author_email=VALUES["author_email"],
    keywords=VALUES["keywords"].split(),
    classifiers=classifiers(VALUES),
    project_urls=urls(VALUES),
    python_requires=f">={VALUES['min_python']}",
    install_requires=lines(VALUES["requirements"]),
    extras_require=extras(VALUES),
    entry_points={
        "console_scripts": lines(VALUES.get("console_scripts", "")),
        "nbdev": [f"{VALUES['lib_path']}={VALUES['lib_path']}._modidx:d"],
    },
)
