"""Pickles, in a process of their own: what was saved comes back, and a file that wants more gets nothing."""

import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from hostile import Call, gadgets
from mlsae import unpickler, untrusted
from mlsae.errors import MlsaeError, ModelError, ResourceError

torch.set_num_threads(1)
LIMIT = 1 << 20


def saved(path: Path, value: Any, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def unpickled(path: Path) -> Any:
    return untrusted.unpickled(path, max_bytes=LIMIT)


def flattened(value: Any) -> Any:
    return unpickler.flattened(value, LIMIT)


# ---- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_and_plain_values_come_back_by_dotted_names(tmp_path: Path, legacy: bool):
    shared = torch.randn(4, 3)
    tensors = {
        "encoder.weight": shared,
        "encoder.again": shared.T,  # as a state dict has tied weights
        "scales.0": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.nn.Parameter(torch.randn(2).bfloat16()),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 5),
    }
    values = {
        "cfg.k": 32,
        "cfg.name": "ö\n",
        "cfg.lr": 2e-4,
        "cfg.off": None,
        "cfg.on": True,
        "cfg.shape": [1, [2, "x"]],
    }
    nested = OrderedDict(
        encoder={"weight": shared, "again": shared.T},
        scales={0: tensors["scales.0"]},
        cfg={**{name[4:]: value for name, value in values.items()}, "shape": (1, (2, "x"))},
        empty={},
        **{name: tensor for name, tensor in tensors.items() if "." not in name},
    )
    found, plain = unpickled(saved(tmp_path / "a.pt", nested, legacy=legacy))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach())
    assert plain == values
    assert not list(tmp_path.glob("*.safetensors"))


REFUSED = {
    "a list": ([torch.ones(1)], "holds a list where a dictionary of tensors should be"),
    "a set": ({"a": {1}}, "'a' is a set, neither a tensor nor a plain value"),
    "bytes": ({"a": b"x"}, "'a' is a bytes, neither"),
    "tensors in a list": ({"a": [torch.ones(1)]}, "'a' is a Tensor, neither"),
    "NaN": ({"a": {"b": float("nan")}}, "'a.b' is nan, neither"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "'a' is no dense tensor"),
    "nowhere": ({"a": torch.ones(3, device="meta")}, "'a' is no dense tensor"),
    "twice": ({"a.b": 1, "a": {"b": torch.ones(1)}}, "'a.b' stands twice"),
    "one name": ({1: 1, "1": 2}, "'1' stands twice"),
    "a name that is none": ({(1, 2): 1}, "holds a tuple where a name should be"),
    "strides": ({"a": torch.ones(1).expand(LIMIT)}, f"'a' makes it more than {LIMIT} bytes of tensors"),
    "one too many": ({"a": torch.ones(LIMIT // 8), "b": torch.ones(LIMIT // 8 + 1)}, "'b' makes it more than"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_refused_by_name(kind: str):
    value, words = REFUSED[kind]
    with pytest.raises(ModelError, match=words):
        flattened(value)


def test_tensors_of_just_the_limit_are_read():
    assert flattened({"a": torch.ones(LIMIT // 8), "b": torch.ones(LIMIT // 8)})[0].keys() == {"a", "b"}


@pytest.mark.parametrize("empty", [{}, []])
def test_what_is_shared_without_end_is_refused_at_once(empty: Any):
    """Thirty levels, each twice in the next, are a billion entries of a file of a kilobyte."""
    value: Any = empty
    for _ in range(28):
        value = {"a": value, "b": value} if isinstance(empty, dict) else [value, value]
    with pytest.raises(ModelError, match=f"holds more than {unpickler.MAX_ENTRIES} entries"):
        flattened({"a": value})
    for _ in range(40):
        value = {"a": value} if isinstance(empty, dict) else [value]
    with pytest.raises(ModelError, match=r"nested deeper than 32 levels|is a list, neither"):
        flattened({"a": value})


# ---- before a process is started -------------------------------------------------------------------------------------


def test_size_and_kind_are_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", lambda *what, **how: pytest.fail("a process was started"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "cut.pt").write_bytes(saved(tmp_path / "whole.pt", {"a": torch.ones(9)}).read_bytes()[:300])
    bomb = saved(tmp_path / "bomb.pt", {"a": torch.ones(1)})
    with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(10 * LIMIT))
    assert bomb.stat().st_size < LIMIT
    for legacy in (False, True):
        saved(tmp_path / f"large-{legacy}.pt", {"a": torch.ones(LIMIT)}, legacy=legacy)
    for name, words in {
        "none": "no such file",
        "plain": "holds more than tensors, or is damaged: torch.save did not write it",
        "cut": r"holds more than tensors, or is damaged \(BadZipFile\)",
        "bomb": f"holds 10[0-9]+ bytes; at most {LIMIT} are read",
        "large-False": f"bytes; at most {LIMIT} are read",
        "large-True": f"bytes; at most {LIMIT} are read",
    }.items():
        with pytest.raises(ModelError, match=words):
            unpickled(tmp_path / f"{name}.pt")
    monkeypatch.setattr(untrusted, "free_bytes", lambda path: 100)
    with pytest.raises(ResourceError, match=r"disk full: .* 100 free; free some, or set TMPDIR"):
        unpickled(tmp_path / "whole.pt")


# ---- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "words"),
    {
        "import os; os.kill(os.getpid(), 9)": "ended by SIGKILL; it is damaged, or memory ran out",
        "import time; time.sleep(60)": "was not read within 1 s",
        "import os; os._exit(3)": r"holds more than tensors, or is damaged \(it asked for more than memory\)",
        "1 / 0": r"holds more than tensors, or is damaged \(ZeroDivisionError\)",
        "import sys; open(sys.argv[2] + '/answer.json', 'w').write('{')": "plain values that cannot be read",
        "import sys; open(sys.argv[2] + '/answer.json', 'w').write('{\"values\": {}}')": "no such file",
    }.items(),
)
def test_a_process_that_ends_otherwise_is_one_sentence(tmp_path: Path, monkeypatch, does: str, words: str):
    path = saved(tmp_path / "a.pt", {"a": torch.ones(1)})
    monkeypatch.setattr(untrusted, "PICKLE_READER", does)
    monkeypatch.setattr(untrusted, "PICKLE_SECONDS", 1)
    before = set(Path(untrusted.tempfile.gettempdir()).glob("mlsae-*"))
    with pytest.raises(MlsaeError, match=words) as caught:
        unpickled(path)
    assert "\n" not in str(caught.value)
    assert set(Path(untrusted.tempfile.gettempdir()).glob("mlsae-*")) <= before


def test_memory_is_bounded(tmp_path: Path):
    """The restricted unpickler makes an array of any size."""
    path = saved(tmp_path / "a.pt", {"a": Call(bytearray, 3_000_000_000)})
    with pytest.raises(ModelError, match=f"needs more memory than a file of {LIMIT} bytes should"):
        unpickled(path)


def test_the_process_inherits_no_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(
        untrusted,
        "PICKLE_READER",
        "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[2] + '/answer.json', 'w'))",
    )
    untrusted._unpickle(saved(tmp_path / "a.pt", {}), tmp_path, LIMIT)
    assert json.loads((tmp_path / "answer.json").read_text()).keys() <= {
        *("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "LC_CTYPE", "PWD", "SHLVL", "_")
    }


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


PLAIN = ("os.system", "opcodes", "eval", "exec", "subprocess", "run a file", "setstate", "state setter", "code object")


@pytest.mark.parametrize("gadget", PLAIN)
def test_were_the_unpickler_not_restricted_a_gadget_would_still_do_nothing(tmp_path: Path, gadget: str):
    canary = tmp_path / "canary"
    (tmp_path / "gadget").write_bytes(gadgets(canary)[gadget])
    load = "import pickle, sys; data = open(sys.argv[1], 'rb').read(); "
    if gadget == "setstate":  # what it makes must be called
        load += "pickle.loads = lambda data, loads=pickle.loads: getattr(loads(data), '__call__', lambda: None)(); "
    guarded = "from mlsae import unpickler\nwith unpickler.guarded():\n    pickle.loads(data)"
    assert python(f"{load}\n{guarded}", str(tmp_path / "gadget")).returncode == 3
    assert not canary.exists()
    python(f"{load}\npickle.loads(data)", str(tmp_path / "gadget"))
    assert canary.exists()


def test_the_process_has_no_network(tmp_path: Path):
    """An empty one where the kernel gives one to anybody, and no call that asks for one while the pickle is read."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        imports = "import os, socket\nfrom mlsae import unpickler\n"
        assert python(f"{imports}{connect}").returncode == 0
        assert python(f"{imports}with unpickler.guarded():\n    {connect}").returncode == 3
        cut = python(f"{imports}unpickler.without_network()\nprint(os.readlink('/proc/self/ns/net'))\n{connect}")
        if cut.stdout.strip() == os.readlink("/proc/self/ns/net"):
            pytest.skip("this kernel gives no network of its own to this user")
        assert (cut.returncode, "OSError" in cut.stderr) == (1, True)
