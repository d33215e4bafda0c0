"""The public names: complete, documented, light to import, and not hidden by the files they live in."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mlsae

PROMISED = {"LanguageModel", "MLSAE", "MLSAEConfig", "Code", "TrainConfig", "train", "Run", "Trainer", "StepReport"}
PROMISED |= {"evaluate", "Evaluation", "analyze", "Analysis", "analysis"}
"""The names that the design promises, so far."""


def test_all_is_complete_and_in_order():
    names = mlsae.__all__
    assert len(names) == len(set(names))
    assert set(names) >= PROMISED
    assert dir(mlsae) == sorted(names)
    groups = [
        [n for n in names if kind(n)]
        for kind in (str.isupper, lambda n: n[0].isupper() and not n.isupper(), str.islower)
    ]
    assert names == [name for group in groups for name in sorted(group)]


@pytest.mark.parametrize("name", mlsae.__all__)
def test_every_name_is_there_and_documented(name: str):
    thing = getattr(mlsae, name)
    assert thing is getattr(mlsae, name)
    assert inspect.getdoc(thing)
    if isinstance(thing, ModuleType):
        for inner in thing.__all__:
            assert_documented(getattr(thing, inner), inner)
    else:
        assert thing.__name__ == name
        assert_documented(thing, name)


def assert_documented(thing: object, name: str) -> None:
    """The thing itself, and everything public that it defines, has a docstring of its own."""
    if not inspect.isclass(thing):
        assert thing.__doc__, name
        return
    assert not generated(thing), f"{name} has only a dataclass's generated docstring"
    for attribute, member in vars(thing).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not attribute.startswith("_") and inspect.isfunction(function):
            assert function.__doc__, f"{name}.{attribute}"


def generated(thing: type) -> bool:
    return not thing.__doc__ or (dataclasses.is_dataclass(thing) and thing.__doc__.startswith(f"{thing.__name__}("))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mlsae.nothing
    assert not hasattr(mlsae, "trian")


@pytest.mark.parametrize("name", ["train", "evaluate", "analyze"])
@pytest.mark.parametrize(
    "statement",
    ["import mlsae.{0}", "from mlsae.{0} import {0}", "import importlib; importlib.import_module('mlsae.{0}')"],
)
def test_a_function_is_not_hidden_by_its_file(name: str, statement: str):
    exec(statement.format(name), {})
    assert callable(getattr(mlsae, name))
    assert getattr(mlsae, name) is getattr(importlib.import_module(f"mlsae.{name}"), name)


def test_results_have_to_dict():
    for name in ("Run", "Evaluation", "Analysis", "StepReport"):
        assert callable(getattr(mlsae, name).to_dict)
        assert dataclasses.fields(getattr(mlsae, name))


def test_every_module_says_what_it_is():
    for path in Path(mlsae.__path__[0]).rglob("*.py"):
        assert path.name == "__main__.py" or ast.get_docstring(ast.parse(path.read_text())), path


def test_importing_costs_and_prints_nothing():
    script = (
        "import sys, mlsae\n"
        "from mlsae import MLSAEConfig, TrainConfig, ConfigError\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
