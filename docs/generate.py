"""Write docs/cli.md, and the plans in docs/scale.md, from the commands themselves. `--check` only says if they are current."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

os.environ["COLUMNS"] = "110"

from mlsae.cli import COMMANDS, HELP, main

HERE = Path(__file__).parent
PLAN = re.compile(r"(```\n\$ (mlsae plan [^`]*?[^\\\n])\n)[^$]*?(?=```)")
"""A command, over lines that end in a backslash, and what it printed."""
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


def planned(text: str) -> str:
    """A page whose plans are what the commands above them print."""

    def printed(found: re.Match[str]) -> str:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            main(found[2].replace("\\\n", " ").split()[1:])
        return found[1] + shown.getvalue()

    return PLAN.sub(printed, text)


if __name__ == "__main__":
    for path, wanted in ((HERE / "cli.md", page()), (HERE / "scale.md", planned((HERE / "scale.md").read_text()))):
        if "--check" not in sys.argv:
            path.write_text(wanted)
        elif path.read_text() != wanted:
            sys.exit(f"docs/{path.name} is out of date; run make docs")
