"""Files from others: what is well made comes back, and the rest is refused with its place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlsae import files, untrusted
from mlsae.errors import ConfigError, MlsaeError, ModelError

torch.set_num_threads(1)


# ---- reading JSON and YAML -------------------------------------------------------------------------------------------

BAD_JSON = {
    "duplicate": ('{"a": 1, "a": 2}', "key 'a' stands twice"),
    "duplicate deep": ('[{"b": {"a": 1, "a": 2}}]', "key 'a' stands twice"),
    "BOM": ("\ufeff{}", "line 1, column 1: starts with a byte-order mark"),
    "empty": ("", "line 1, column 1: the file is empty"),
    "white": (" \n\t\n", "line 1, column 1: the file is empty"),
    "not JSON": ('{\n  "a": 1,\n  oops\n}', "line 3, column 3: not JSON"),
    "cut short": ('{"a": [1, 2', "line 1, column 12: not JSON"),
    "two values": ("{}\n{}", "line 2, column 1: not JSON"),
    "too deep": ("[" * 33 + "]" * 33, "nested deeper than 32"),
    "too long": (json.dumps("x" * (1 << 20)), "1048578 bytes; at most 1048576"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_refused_with_its_place(tmp_path, kind):
    text, message = BAD_JSON[kind]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        untrusted.read_json(tmp_path / "a.json")
    assert caught.value.field == str(tmp_path / "a.json")


def test_bytes_that_are_no_text_are_refused_with_their_offset(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    for read in (untrusted.read_json, untrusted.read_yaml):
        with pytest.raises(ConfigError, match="byte 7: not UTF-8"):
            read(tmp_path / "a.json")


def test_a_folder_or_nothing_at_all_is_no_json(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="no such file"):
            untrusted.read_json(path)


@pytest.mark.parametrize("depth", [33, 100, 500, 900, 5_000, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_of_any_depth_is_refused_and_not_a_crash(opening, depth):
    closing = {"[": "]", '{"a":': "}"}[opening]
    with pytest.raises(ConfigError, match="nested deeper"):
        untrusted.parse_json(opening * depth + "1" + closing * depth, Path("a.json"))


def test_json_at_the_limit_of_depth(tmp_path):
    untrusted.parse_json("[" * 32 + "]" * 32, Path("a.json"))


def test_yaml_numbers_are_numbers(tmp_path):
    (tmp_path / "a.yaml").write_text("tokens: 1e8\nlr: 2e-4\nk: 32\nbig: 1.5E+3\nneg: -1e3\ntext: e8\nname: '1e8'\n")
    values = untrusted.read_yaml(tmp_path / "a.yaml")
    assert values == {"tokens": 1e8, "lr": 2e-4, "k": 32, "big": 1500.0, "neg": -1000.0, "text": "e8", "name": "1e8"}


def test_json_is_yaml(tmp_path):
    value = {"tokens": 1e8, "layers": [0, 2], "lm": None, "repeat": False, "text": "naïve: 🙂"}
    files.write_json(tmp_path / "a.json", value)
    assert untrusted.read_yaml(tmp_path / "a.json") == value


BAD_YAML = {
    "duplicate": ("a: 1\nb: 2\na: 3\n", r"line [13], column 1: key 'a' stands twice"),
    "duplicate deep": ("x:\n  a: 1\n  a: 3\n", r"line [23], column 3: key 'a' stands twice"),
    "object": ("a: !!python/object/apply:os.system ['true']\n", "line 1, column 4: could not determine a constructor"),
    "name": ("a: !!python/name:os.system\n", "line 1, column 4: could not determine a constructor"),
    "own tag": ("a: !thing 3\n", "line 1, column 4: could not determine a constructor"),
    "list": ("- a\n- b\n", "line 1, column 1: holds a list"),
    "text": ("just words\n", "line 1, column 1: holds a text"),
    "comment": ("# nothing here\n", "line 1, column 1: holds nothing"),
    "tab": ("a:\n\tb: 1\n", "line 2, column 1"),
    "open": ("a: [1, 2\n", "line 2, column 1"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2, column 1"),
    "unhashable key": ("? [a, b]\n: 1\n", "unhashable"),
    "empty": ("", "line 1, column 1: the file is empty"),
    "BOM": ("\ufeffa: 1\n", "byte-order mark"),
    "control": ("a: \x07\n", "not YAML"),
    "deep": ("a: " + "[" * 1000 + "]" * 1000 + "\n", "not YAML|nested deeper"),
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_bad_yaml_is_refused_with_its_place(tmp_path, kind):
    text, message = BAD_YAML[kind]
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        untrusted.read_yaml(tmp_path / "a.yaml")


# ---- reading tensors -------------------------------------------------------------------------------------------------

EXPECTED = {"W": (torch.float32, (3, 2)), "n": (torch.int64, (2,))}


def good_tensors():
    return {"W": torch.arange(6.0).reshape(3, 2), "n": torch.tensor([1, 2])}


def test_tensors_come_back_exactly(tmp_path):
    tensors = {
        **good_tensors(),
        "b": torch.tensor([True]),
        "u": torch.arange(5, dtype=torch.uint8),
        "h": torch.ones(2).bfloat16(),
    }
    tensors["t"] = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    tensors["s"] = torch.tensor(3.0)
    tensors["e"] = torch.empty(0, 4)
    files.save_tensors(tmp_path / "a", tensors)
    found = untrusted.load_tensors(tmp_path / "a")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) and found[k].dtype == tensors[k].dtype for k in tensors)


BAD_TENSORS = {
    "missing": (lambda t: t.pop("n"), "tensor 'n' is missing"),
    "unknown": (lambda t: t.update(extra=torch.ones(1)), "tensor 'extra' is unknown"),
    "renamed": (lambda t: t.update(w=t.pop("W")), "tensor 'W' is missing"),
    "reshaped": (
        lambda t: t.update(W=t["W"].T.contiguous()),
        r"tensor 'W' has shape \[2, 3\]; config.json needs \[3, 2\]",
    ),
    "flattened": (lambda t: t.update(W=t["W"].flatten()), r"tensor 'W' has shape \[6\]"),
    "recast": (lambda t: t.update(W=t["W"].double()), "tensor 'W' is F64; it must be F32"),
    "half": (lambda t: t.update(W=t["W"].bfloat16()), "tensor 'W' is BF16; it must be F32"),
    "integers": (lambda t: t.update(n=t["n"].int()), "tensor 'n' is I32; it must be I64"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_that_are_not_the_expected_ones_are_named(tmp_path, kind):
    change, message = BAD_TENSORS[kind]
    tensors = good_tensors()
    change(tensors)
    save_file(tensors, tmp_path / "a")
    with pytest.raises(ModelError, match=message):
        untrusted.load_tensors(tmp_path / "a", EXPECTED)


def header(value, data=b"", length=None):
    """A safetensors file with any header, true or not."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
LIES = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of nothing": b"\0" * 8,
    "header 2^63": header(b"{}", length=2**63),
    "header 2^64 - 1": header(b"{}", length=2**64 - 1),
    "header longer than the file": header(b"{}", length=3),
    "header shorter than itself": header({"W": ONE}, b"\0" * 4, length=5),
    "not JSON": header(b"{oops}"),
    "a list": header(b"[]"),
    "not UTF-8": header(b'{"\xff": 1}'),
    "deep": header(b'{"a":' * 2000 + b"1" + b"}" * 2000),
    "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00" + b"\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "zip": b"PK\x03\x04" + b"\0" * 60,
    "cut short": header({"W": ONE}, b"\0" * 3),
    "trailing bytes": header({"W": ONE}, b"\0" * 5),
    "hole": header({"W": {**ONE, "data_offsets": [4, 8]}}, b"\0" * 8),
    "overlap": header({"W": ONE, "V": {**ONE, "data_offsets": [0, 4]}}, b"\0" * 4),
    "backwards": header({"W": {**ONE, "data_offsets": [4, 0]}}, b"\0" * 4),
    "negative shape": header({"W": {**ONE, "shape": [-1]}}, b"\0" * 4),
    "float shape": header({"W": {**ONE, "shape": [1.0]}}, b"\0" * 4),
    "huge shape": header({"W": {**ONE, "shape": [2**40, 2**40]}}, b"\0" * 4),
    "overflowing shape": header({"W": {**ONE, "shape": [2**62, 4]}}, b"\0" * 4),
    "unknown dtype": header({"W": {**ONE, "dtype": "F99"}}, b"\0" * 4),
    "no dtype": header({"W": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "W": ONE}, b"\0" * 4),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_file_that_lies_about_itself_is_refused(tmp_path, kind):
    """With or without a list of what is expected, never anything but our own error."""
    (tmp_path / "a").write_bytes(LIES[kind])
    for expected in (None, {"W": (torch.float32, (1,))}):
        with pytest.raises(MlsaeError, match=str(tmp_path)):
            untrusted.load_tensors(tmp_path / "a", expected)


def test_a_header_too_large_to_be_true_is_refused_from_its_size(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.write((200 << 20).to_bytes(8, "little"))
        file.truncate(300 << 20)  # sparse
    with pytest.raises(ModelError, match="header of"):
        untrusted.load_tensors(tmp_path / "a")


def test_no_file_no_tensors(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match="no such file"):
            untrusted.load_tensors(path)


def test_random_damage_gives_an_error_or_tensors_of_the_right_shape(tmp_path):
    files.save_tensors(tmp_path / "good", good_tensors())
    good = (tmp_path / "good").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        place, bit = (int(torch.randint(n, (1,), generator=generator)) for n in (len(good), 8))
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        (tmp_path / "bad").write_bytes(bad)
        try:
            found = untrusted.load_tensors(tmp_path / "bad", EXPECTED)
        except ModelError:
            continue
        assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == EXPECTED


def test_slices_are_parts_of_the_tensors(tmp_path):
    files.save_tensors(tmp_path / "a", {"W": torch.arange(12.0).view(3, 4), "n": torch.tensor([7])})
    expected = {"W": (torch.float32, (3, 4)), "n": (torch.int64, (1,))}
    with untrusted.tensor_slices(tmp_path / "a", expected) as slices:
        assert slices["W"][:, 1:2].tolist() == [[1], [5], [9]]
        assert slices["n"][0].item() == 7
    for wrong in (
        {"W": (torch.float32, (3, 4))},
        {**expected, "W": (torch.float32, (4, 3))},
        {**expected, "b": expected["n"]},
    ):
        with pytest.raises(ModelError, match="tensor '"), untrusted.tensor_slices(tmp_path / "a", wrong):
            pass
    with pytest.raises(ModelError, match="no such file"), untrusted.tensor_slices(tmp_path / "b", expected):
        pass


# ---- reading lines as they come --------------------------------------------------------------------------------------


def test_lines_are_read_from_where_the_last_ones_ended(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    lines, end = untrusted.read_jsonl_from(path, 0)
    assert (lines, end) == ([{"a": 1}, {"a": 2}], 18)
    assert untrusted.read_jsonl_from(path, end) == ([], end)
    path.write_text(path.read_text() + ': "é"}\n')
    assert untrusted.read_jsonl_from(path, end) == ([{"a": "é"}], path.stat().st_size)


@pytest.mark.parametrize("line", [b"[1]\n", b"{\n", b"\xff\n", b'{"a": NaN}\n'])
def test_other_lines_are_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line)
    with pytest.raises(ConfigError):
        untrusted.read_jsonl_from(tmp_path / "a.jsonl", 0)
