"""Every example in a docstring is true."""

import doctest
import importlib
import pkgutil

import pytest

import neutral

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(neutral.__path__, "neutral.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) > 10
