"""What the pages say is what the code does."""

import re
import subprocess
import sys
from pathlib import Path

from tiny import save_tiny_lm

ROOT = Path(__file__).parents[1]


def test_the_command_line_page_is_current():
    """`make docs` writes it from the commands' own help."""
    check = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_the_readme_example_runs(tmp_path, monkeypatch):
    """Ten lines, with a tiny model and text in place of the named ones."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    save_tiny_lm(tmp_path / "lm")
    words = " ".join(f"word{i % 97} and {i % 13}" for i in range(12))
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{i} {words}"}}\n' for i in range(400)))
    block = block.replace("EleutherAI/pythia-70m-deduped", "lm").replace("10_000_000", "6_000, context_length=32")
    monkeypatch.chdir(tmp_path)
    printed: list[object] = []
    exec(block, {"print": lambda *values: printed.extend(values)})
    fvu, dead, shape, held_out_fvu, decomposition = printed
    assert 0 < fvu < 1.5
    assert 0 <= dead <= 1
    assert shape[-1] == 32
    assert 0 < held_out_fvu < 1.5
    assert decomposition.total > 0


def test_every_file_is_on_the_readme_map():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "src" / "mlsae").rglob("*.py"):
        if not path.name.startswith("__") and "ops" not in path.parts:
            assert path.name in readme, path.name


def test_every_name_on_the_method_page_exists():
    """`module.Name.attribute` in the last column of the table."""
    import importlib

    for line in (ROOT / "docs" / "method.md").read_text().splitlines():
        if line.startswith("|") and line.count("|") >= 4:
            for name in re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_]+(?:\.[a-z_]+)?)`", line.rsplit("|", 2)[1]):
                _resolve(importlib, name)


def _resolve(importlib, name: str) -> None:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(["mlsae", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return
    raise AssertionError(name)
