"""Numbers in words: to a few digits, with their intervals where they have one, and a dash where there is none."""

import math
from collections.abc import Callable, Mapping
from typing import Any

NULL_NAMES = {"independent": "independent layers", "shuffled_layers": "shuffled layers"}
"""What the nulls of analysis.nulls are called."""


def plain(value: Any) -> float:
    """A number without its interval; NaN where there is none."""
    value = value["value"] if isinstance(value, Mapping) else value
    return math.nan if value is None else float(value)


def ends(value: Any) -> tuple[float, float]:
    """The ends of a number's interval, NaN where it has none."""
    low, high = value.get("ci95", (None, None)) if isinstance(value, Mapping) else (None, None)
    return plain(low), plain(high)


def number(value: Any, digits: int = 3) -> str:
    """A number to so many significant digits; its interval follows in brackets."""
    return _with_interval(value, lambda x: _number(x, digits))


def signed(value: Any) -> str:
    """The same with its sign."""
    return ("+" if plain(value) > 0 else "") + number(value)


def percent(share: Any) -> str:
    """A share as a percentage of about two digits; only 0 and 1 themselves read 0 % and 100 %."""
    return _with_interval(share, _percent)


def duration(seconds: int | float) -> str:
    """Hours, minutes and seconds, the two largest that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{number(seconds, 2)} s"


def _with_interval(value: Any, words: Callable[[float], str]) -> str:
    low, high = ends(value)
    known = math.isfinite(low) and math.isfinite(high) and not low == high == plain(value)
    return words(plain(value)) + (f" [{words(low)}, {words(high)}]" if known else "")


def _number(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "–"
    if value == int(value):
        text = f"{int(value):,}"
    elif 1e-3 <= abs(value) < 1e6:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    else:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", "−")


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "–"
    if 0 < share < 1e-4 or 0.9995 < share < 1:
        return "< 0.01 %" if share < 0.5 else "> 99.9 %"
    text = f"{100 * share:.2g}" if 0 < abs(share) < 0.0995 else f"{100 * share:.{int(0.99 < share < 1)}f}"
    return text.replace("-", "−") + " %"
