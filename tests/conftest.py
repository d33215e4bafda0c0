"""What every test shares: one thread, fixed seeds, no network, no cache outside the session, and a tiny trained run."""

import atexit
import hashlib
import json
import logging
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["MLSAE_CACHE"] = tempfile.mkdtemp(prefix="mlsae-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
atexit.register(shutil.rmtree, os.environ["MLSAE_CACHE"], ignore_errors=True)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from mlsae import files  # noqa: E402
from mlsae.lm import LanguageModel  # noqa: E402
from tiny import save_tiny_lm  # noqa: E402

torch.set_num_threads(1)

collect_ignore = ["formats/peers"]
"""Scripts for the Pythons of other libraries."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("MLSAE_WRITE_FORMATS") and not session.testsfailed:
        import tables  # beside the tests that filled it, which have put its folder on the path

        tables.write()


STEP_TOKENS = 64
TRAIN = {"--k": "4", "--expansion-factor": "2", "--tokens": "1e3", "--init-tokens": "512"}
"""A run of fifteen steps."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that use it
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is tried again at once."""
    monkeypatch.setattr(files, "PAUSES", (0, 0, 0))


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The command line sets up the `mlsae` logger for a process of its own; here every test starts without that."""
    logger = logging.getLogger("mlsae")
    before = list(logger.handlers), logger.propagate, logger.level
    logger.handlers.clear()
    logger.propagate = True
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers, d_model 32, context 64, with a byte tokenizer."""
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "tiny-llama")


@pytest.fixture(scope="session")
def lm(lm_folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(lm_folder, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three splits without a document in common."""
    folder = tmp_path_factory.mktemp("corpus")
    words = re.findall(r"\w+", "the cat sat on a mat while dogs ran far from every house by moon light")
    for split, n_documents in {"train": 40, "validation": 8, "test": 8}.items():
        draw = random.Random(split)
        texts = (f"{split} {i}: {' '.join(draw.choices(words, k=12 + i % 9))}." for i in range(n_documents))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, lm_folder: Path, corpus: Path) -> Path:
    """A finished run directory; copy it before changing it."""
    from mlsae.cli import main

    run = tmp_path_factory.mktemp("runs") / "run"
    assert main(train_command(lm=lm_folder, data=corpus, out=run)) == 0
    return run


def train_command(*flags: str, lm: Path, data: Path, out: str | Path) -> list[str]:
    """The arguments of a short run; `flags` stand in for the usual ones of the same name."""
    usual = {"--lm": str(lm), "--data": str(data), "--out": str(out)} | TRAIN
    kept = [word for flag, value in usual.items() if flag not in flags for word in (flag, value)]
    return ["train", *kept, "--quiet", *flags]


def tree(folder: Path) -> dict[str, str]:
    """Every path under a folder with what it holds; a lock names whoever held it last."""
    hashed = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.lock")
    found = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in hashed}
    return {str(p.relative_to(folder)): found.get(p, "") for p in sorted(folder.rglob("*"))}
