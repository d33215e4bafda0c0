"""Write docs/cli.md from the commands themselves. `python docs/generate.py --check` only says whether it is current."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

os.environ["COLUMNS"] = "110"

from mlsae.cli import COMMANDS, HELP, main

TARGET = Path(__file__).parent / "cli.md"
INTRODUCTION = """# The command line

Written by `make docs` from the commands' own help. Exit codes: 0 done, 1 a bug in mlsae, 2 a flag or config, 3 text,
4 files, disk, locks or memory, 5 numbers that are not finite, 6 a language model or SAE, 75 stopped and resumable.
"""


def help_of(arguments: list[str]) -> str:
    """What `mlsae COMMAND --help` prints, without colours."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        main([*arguments, "--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
    return "\n".join(line.rstrip() for line in plain.rstrip().splitlines())


def page() -> str:
    """The whole page."""
    sections = [f"## mlsae {name}\n\n```\n{help_of([name])}\n```" for name in COMMANDS]
    return "\n".join([INTRODUCTION, f"```\n{HELP.rstrip()}\n```\n", "\n\n".join(sections), ""])


if __name__ == "__main__":
    if "--check" not in sys.argv:
        TARGET.write_text(page())
    elif TARGET.read_text() != page():
        sys.exit("docs/cli.md is out of date; run make docs")
