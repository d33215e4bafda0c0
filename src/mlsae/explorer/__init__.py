"""The explorer: every latent at every layer, in a browser. One process, one port, nothing fetched from elsewhere."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from mlsae.config import Placement
from mlsae.errors import ResourceError
from mlsae.explorer.server import Place, Running, serve, start

__all__ = ["Explored", "Place", "Running", "explore", "open_explorer"]

PLAIN = Placement()
"""All on the first device."""
PLOT_STYLE = Path(str(files("mlsae.explorer"))) / "static" / "vendor" / "plot-style.sha256"
"""Hash of the one style sheet that the vendored charts put into their figures, for the policy that forbids all others."""


@dataclass(frozen=True)
class Explored:
    """What was looked at."""

    sae: str
    seconds: float
    """How long it was open."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


def explore(
    sae: str | Path,
    *,
    analysis: str | Path | None = None,
    lm: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8001,
    allow_remote: bool = False,
    allow_hosts: Sequence[str] = (),
    placement: Placement = PLAIN,
    open_browser: bool = False,
    tell: Callable[[str], None] = print,
) -> Explored:
    """Serve the pages of an SAE until SIGINT or SIGTERM; `tell` is given the address, which holds the secret that signs in.

    Args:
        sae: run directory (one that is still training too), SAE folder or Hub id.
        analysis: folder that `analyze` wrote; None: analysis in the run directory.
        lm: language model; None: the one the SAE was trained on. It is loaded when a prompt is first typed.
        port: 0 is any that is free.
        allow_remote: allow a `host` that other machines can reach.
        placement: where the language model goes, and in which precision.
        allow_hosts: further names by which browsers may ask for the pages.

    Raises:
        ModelError: there is no SAE, nor a run that is training one.
        ResourceError: the port is taken, or the pages are not installed.
    """
    place = Place(host, port, allow_remote, tuple(allow_hosts))
    began = time.monotonic()
    serve(
        _app_of(sae, analysis, lm, placement, settle=gc.freeze),
        place,
        style_hash=_style_hash(),
        open_browser=open_browser,
        tell=tell,
    )
    return Explored(str(sae), time.monotonic() - began)


def open_explorer(
    sae: str | Path, *, analysis: str | Path | None = None, lm: str | None = None, place: Place | None = None
) -> Running:
    """The same in a thread of this process, on a free port: a context that ends it; for notebooks and tests."""
    return start(_app_of(sae, analysis, lm, PLAIN), place, style_hash=_style_hash())


def _app_of(
    sae: str | Path,
    analysis: str | Path | None,
    lm: str | None,
    placement: Placement,
    settle: Callable[[], None] = lambda: None,
) -> Callable[[], ASGIApp]:
    """What makes the app, once there is a port for it: torch is imported only then.

    `settle` is called when all that is in memory is there to stay. A process of our own then looks for garbage among newer
    objects only: to look through all of torch and transformers takes it a third of a second, in which it answers nobody.
    """

    def make() -> ASGIApp:
        from mlsae.explorer.app import create_app
        from mlsae.explorer.library import Library

        library = Library.open(sae, analysis=None if analysis is None else Path(analysis), lm=lm)
        library.lm_options = placement.lm_options()
        settle()
        return create_app(library, settle=settle)

    return make


def _style_hash() -> str:
    if not PLOT_STYLE.is_file():
        raise ResourceError("explorer", "its pages are not installed; run 'pip install --force-reinstall mlsae'")
    return PLOT_STYLE.read_text().strip()
