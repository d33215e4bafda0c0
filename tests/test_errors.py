"""The error tree and its exit codes, and text made safe for a terminal."""

import itertools
import unicodedata

import pytest

from mlsae import errors
from mlsae.errors import ConfigError, MlsaeError, did_you_mean, printable

EXIT_CODES = {
    "ConfigError": 2,
    "DataError": 3,
    "ResourceError": 4,
    "NumericsError": 5,
    "ModelError": 6,
    "Interrupted": 75,
}


def test_one_tree_with_one_exit_code_each():
    found = {c.__name__: c.exit_code for c in MlsaeError.__subclasses__() if c.__module__ == errors.__name__}
    assert found == EXIT_CODES
    assert MlsaeError.exit_code == 1
    assert not issubclass(MlsaeError, ValueError | OSError)


def test_an_error_is_a_field_and_a_problem():
    error = ConfigError("k", "0 given; must be at least 1")
    assert (str(error), error.field, error.problem) == (
        "k: 0 given; must be at least 1",
        "k",
        "0 given; must be at least 1",
    )


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "a b", "🙂", "", "'\"\\"])
def test_readable_text_stays_as_it_is(text: str):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\u202egpj", "\\u202egpj"),
        ("\u2066x\u2069", "\\u2066x\\u2069"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("\u00a0", "\\xa0"),
        ("\x00\x7f\x9b", "\\x00\\x7f\\x9b"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_what_could_act_on_a_terminal_is_escaped(text: str, shown: str):
    assert printable(text) == shown


def test_nothing_that_acts_survives_and_twice_is_as_once():
    dense, sparse = [range(0x3000), range(0xD000, 0x10000), range(0xE0000, 0xE0200)], range(0x3000, 0x110000, 97)
    every = "".join(map(chr, itertools.chain(*dense, sparse)))
    shown = printable(every)
    assert {unicodedata.category(ch)[0] for ch in shown if ch != " "}.isdisjoint("CZ")
    assert printable(shown) == shown
    assert len(shown.splitlines()) == 1


def test_did_you_mean():
    assert did_you_mean("expasion_factor", ["k", "expansion_factor"]) == "; did you mean 'expansion_factor'?"
    assert did_you_mean("zzz", ["k", "expansion_factor"]) == ""
    assert did_you_mean("k", []) == ""
