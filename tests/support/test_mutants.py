"""Every mutant says what is wrong with it."""

import pytest

from support.mutants import ALL, Mutant, named
from support.mutants_files import WRITERS


@pytest.mark.parametrize("name", [*ALL, *WRITERS])
def test_a_mutant_says_in_a_sentence_what_is_wrong(name):
    mutant = (ALL | WRITERS)[name]
    assert mutant.name == name and callable(mutant.apply)
    assert mutant.says.endswith(".") and mutant.says[0].isupper() and len(mutant.says.split()) > 4
    assert mutant.source == "" or mutant.source.startswith("https://")


def test_two_mutants_of_one_name_are_refused():
    with pytest.raises(AssertionError):
        named(Mutant("a", "Says.", len), Mutant("a", "Says.", len))
