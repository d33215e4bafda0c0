"""The tables of docs/formats.md, from what the tests of formats found."""

from pathlib import Path
from typing import Any

import proof

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- {} begins: written by `make formats` -->", "<!-- {} ends -->"


def write() -> None:
    """Put both tables into the page."""
    text = PAGE.read_text()
    for name, table in (("equal outputs", outputs()), ("refusals", refusals())):
        begin, end = BEGIN.format(name), END.format(name)
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)


def outputs() -> str:
    """Of every format, direction, input and peer the largest relative difference found."""
    worst: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in proof.ROWS:
        key = tuple(str(row[part]) for part in ("format", "direction", "input", "peer"))
        found = worst.setdefault(key, {"code": 0.0, "recon": 0.0, "n": 0})
        found["n"] += row["n"]
        found |= {part: max(found[part], row[part]) for part in ("code", "recon")}
    lines = [
        "| format | direction | vectors | compared with | code | recon | of vectors |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, found in sorted(worst.items()):
        cells = [*key, f"{found['code']:.1e}", f"{found['recon']:.1e}", f"{found['n']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def refusals() -> str:
    """What was damaged or mislabelled, and the sentence that refused it."""
    lines = ["| format | what is wrong | refused with |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in sorted(proof.REFUSALS))])
