"""The routes: each hands a request to one view and sends the view's dict as a page or, from its `.json` twin, as it is."""

import asyncio
import contextlib
import hashlib
import re
import threading
from collections.abc import AsyncGenerator, Callable
from functools import cache
from importlib.resources import files as resources
from pathlib import Path
from typing import Annotated, Any

import jinja2
import pyarrow as pa
from fastapi import FastAPI, Query, Request
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict
from starlette.background import BackgroundTask
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from mlsae.errors import ResourceError
from mlsae.explorer.answers import QueryFlag, QueryIndex, json_bytes, json_response, parse, shape_errors
from mlsae.explorer.heatmap import heatmap_bytes
from mlsae.explorer.inference import Busy, Worker
from mlsae.explorer.latents import latent_view, neighbours_view
from mlsae.explorer.library import Library
from mlsae.explorer.logits import LogitsRequest, latent_logits_view, logits_view
from mlsae.explorer.notes import NoteRequest, note_view, put_note
from mlsae.explorer.overview import overview_view
from mlsae.explorer.prompts import CompareRequest, PromptRequest, coactive_view, compare_view, prompt_view
from mlsae.explorer.steering import Edit, SteerRequest, steer_view
from mlsae.explorer.table import SearchRequest, search_view
from mlsae.explorer.training import training_view

HERE = Path(str(resources("mlsae.explorer")))
NEEDED = ("static/js/main.js", "static/vendor/plot.umd.min.js", "templates/base.html")
COMPUTED = re.compile(r"/(prompt|compare|steer|logits)\.json|/latents/[^/]+/(coactive|logits)\.json")
"""Paths whose answers the worker computes."""


class _Query(BaseModel):
    """A query string: everything is text, and what is not known is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Places(_Query):
    """Of the heatmap."""

    start: QueryIndex = 0
    stop: QueryIndex | None = None
    width: QueryIndex = 1024


class Since(_Query):
    """Of the training curves."""

    since_step: QueryIndex = 0


class AtLayer(_Query):
    """Of a latent's examples."""

    layer: QueryIndex | None = None


class Nearest(_Query):
    """Of a latent's neighbours."""

    n: QueryIndex = 20


class Asked(_Query):
    """A request of inference.py's views, as text; what is left out has the default that is written there."""

    text: str

    def fields(self) -> dict[str, Any]:
        """The fields of the request that were given."""
        return self.model_dump(exclude_unset=True)


class PromptQuery(Asked):
    """PromptRequest, as text."""

    latent: QueryIndex | None = None
    top: QueryIndex | None = None


class CompareQuery(Asked):
    """CompareRequest, as text."""

    other: str


class Edited(Asked):
    """With edits as Edit spells them."""

    edit: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """The fields of the request that were given, with the edits parsed."""
        fields = super().fields()
        return fields | {"edits": tuple(map(Edit.parse, fields.pop("edit", ())))}


class SteerQuery(Edited):
    """SteerRequest, as text."""

    reconstruct: QueryFlag | None = None
    n_new: QueryIndex | None = None
    pos: QueryIndex | None = None


class LogitsQuery(Edited):
    """LogitsRequest, as text."""

    reconstruct: QueryFlag | None = None
    start: QueryIndex | None = None
    stop: QueryIndex | None = None
    top: QueryIndex | None = None


def create_app(library: Library, *, settle: Callable[[], None] = lambda: None) -> FastAPI:
    """The explorer of one library, without the guard that has to stand before it.

    `settle` is called when the language model has been loaded.

    Raises ResourceError if the pages are not installed.
    """
    for name in NEEDED:
        if not (HERE / name).is_file():
            raise ResourceError("explorer", f"{name} is not installed; run 'pip install --force-reinstall mlsae'")
    worker = Worker(library, settle=settle)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        threading.Thread(target=library.warm, daemon=True).start()
        yield
        worker.close()

    app = _Site(worker, title="mlsae explorer", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.mount(static_root(), _Kept(directory=HERE / "static"))
    shape_errors(app, page=lambda status, body: _page(library, "error", body, status))
    _add_numbers(app, library)
    _add_inference(app, worker)
    _add_pages(app, library)
    return app


class _Site(FastAPI):
    """An app before whose routing those wait for whom its worker has no place."""

    def __init__(self, worker: Worker, **settings: Any):
        super().__init__(**settings)
        self._worker = worker
        self._line = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._worker.is_full and COMPUTED.fullmatch(scope["path"]):
            await self._stand_in_line()
        await super().__call__(scope, receive, send)

    async def _stand_in_line(self) -> None:
        """Raises Busy unless a place is free by then. One a turn of the event loop: a crowd is not answered before all others."""
        async with self._line:
            await asyncio.sleep(0)
            if self._worker.is_full:
                raise Busy


class _Kept(StaticFiles):
    """Files that a browser never asks for again: another content has another address."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "private, max-age=31536000, immutable"
        return response


@cache
def static_root() -> str:
    """Where the scripts and styles are: an address that changes whenever one of them does."""
    digest = hashlib.sha256()
    for path in sorted((HERE / "static").rglob("*")):
        digest.update(str(path.relative_to(HERE)).encode() + (path.read_bytes() if path.is_file() else b""))
    return f"/static-{digest.hexdigest()[:16]}"


# ---- pages -----------------------------------------------------------------------------------------------------------


def _add_pages(app: FastAPI, library: Library) -> None:
    """HTML. The query of a page is its scripts' to read: it holds the page's state."""

    @app.get("/")
    def root() -> Response:
        return RedirectResponse("/overview", 303)

    @app.get("/overview")
    def overview() -> Response:
        return _page(library, "overview", overview_view(library))

    @app.get("/latents/{latent}")
    def latent(latent: QueryIndex, request: Request) -> Response:
        layer = request.query_params.get("layer", "")
        wanted = int(layer) if layer.isascii() and layer.isdigit() and int(layer) in library.layers else None
        return _released(_page(library, "latent", latent_view(library, latent, wanted)))

    @app.get("/search")
    def search() -> Response:
        return _page(library, "search", {"missing": library.missing("analysis", "table")})

    for name in ("prompt", "steer", "logits"):
        app.get(f"/{name}", name=name)(_shell(library, name))


def _shell(library: Library, name: str) -> Any:
    """A page without numbers: its scripts ask for them, as that may load the language model."""

    def shell() -> Response:
        return _page(library, name, {"missing": library.missing("sae")})

    return shell


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True)


def _page(library: Library, name: str, data: dict[str, Any], status: int = 200) -> Response:
    site = {"name": library.name, "lm": library.lm_name, "n_latents": library.n_latents, "layers": library.layers}
    return HTMLResponse(rendered(name, site, data), status)


def rendered(page: str, site: dict[str, Any], data: dict[str, Any]) -> bytes:
    """A page's HTML in UTF-8, its dict in words and, for its scripts, in a block that no text in it can end."""
    in_html = json_bytes(data).decode().replace("<", "\\u003c")
    return (
        _templates()
        .get_template(f"{page}.html")
        .render(page=page, site=site, data=data, data_json=Markup(in_html), static=static_root())
        .encode("utf-8", "backslashreplace")  # a folder's name need not be Unicode
    )


def _released(response: Response) -> Response:
    """A response after which pyarrow gives memory back: it would keep the largest groups of rows that it ever held."""
    response.background = BackgroundTask(pa.default_memory_pool().release_unused)
    return response


# ---- numbers that are there ------------------------------------------------------------------------------------------


def _add_numbers(app: FastAPI, library: Library) -> None:
    """JSON of what files hold; views that read or sort are run in threads, as every plain function here is."""

    @app.get("/health")
    async def health() -> Response:
        return json_response({"ok": True})

    @app.get("/overview.json")
    def overview_json() -> Response:
        return json_response(overview_view(library))

    @app.get("/heatmap.bin")
    def heatmap(places: Annotated[Places, Query()]) -> Response:
        columns = heatmap_bytes(library, places.start, places.stop, places.width)
        return Response(columns, media_type="application/octet-stream")

    @app.get("/training.json")
    def training(since: Annotated[Since, Query()]) -> Response:
        return json_response(training_view(library.training, since.since_step))

    @app.get("/search.json")
    def search_json(request: Annotated[SearchRequest, Query()]) -> Response:
        return json_response(search_view(library, request), less="fewer rows")

    @app.get("/latents/{latent}.json")
    def latent_json(latent: QueryIndex, at: Annotated[AtLayer, Query()]) -> Response:
        return _released(json_response(latent_view(library, latent, at.layer), less="one layer"))

    @app.get("/latents/{latent}/neighbours.json")
    def neighbours(latent: QueryIndex, nearest: Annotated[Nearest, Query()]) -> Response:
        return json_response(neighbours_view(library, latent, nearest.n))

    @app.get("/latents/{latent}/note.json")
    def note(latent: QueryIndex) -> Response:
        return json_response(note_view(library, latent))

    @app.put("/latents/{latent}/note")
    async def change_note(latent: QueryIndex, request: Request) -> Response:
        asked = parse(NoteRequest, await request.body())
        return json_response(await asyncio.to_thread(put_note, library, latent, asked))


# ---- numbers that are computed ---------------------------------------------------------------------------------------


def _add_inference(app: FastAPI, worker: Worker) -> None:
    """JSON of what the language model says, one at a time; by GET for links and by POST for long texts."""

    @app.get("/progress.json")
    async def progress() -> Response:
        return json_response(worker.progress())

    @app.get("/prompt.json")
    async def prompt_by_get(query: Annotated[PromptQuery, Query()]) -> Response:
        return await answer("prompt", prompt_view, PromptRequest(**query.fields()))

    @app.post("/prompt.json")
    async def prompt(request: Request) -> Response:
        return await answer("prompt", prompt_view, parse(PromptRequest, await request.body()))

    @app.get("/compare.json")
    async def compare_by_get(query: Annotated[CompareQuery, Query()]) -> Response:
        return await answer("compare", compare_view, CompareRequest(**query.fields()))

    @app.post("/compare.json")
    async def compare(request: Request) -> Response:
        return await answer("compare", compare_view, parse(CompareRequest, await request.body()))

    @app.get("/steer.json")
    async def steer_by_get(query: Annotated[SteerQuery, Query()]) -> Response:
        return await answer("steer", steer_view, SteerRequest(**query.fields()))

    @app.post("/steer.json")
    async def steer(request: Request) -> Response:
        return await answer("steer", steer_view, parse(SteerRequest, await request.body()))

    @app.get("/logits.json")
    async def logits_by_get(query: Annotated[LogitsQuery, Query()]) -> Response:
        return await answer("logits", logits_view, LogitsRequest(**query.fields()))

    @app.post("/logits.json")
    async def logits(request: Request) -> Response:
        return await answer("logits", logits_view, parse(LogitsRequest, await request.body()))

    @app.get("/latents/{latent}/coactive.json")
    async def coactive(latent: QueryIndex) -> Response:
        return await answer("co-active latents", coactive_view, latent)

    @app.get("/latents/{latent}/logits.json")
    async def latent_logits(latent: QueryIndex) -> Response:
        return await answer("logit lens", latent_logits_view, latent)

    async def answer(what: str, view: Any, *asked: Any) -> Response:
        found = await worker.run(what, view, *asked)
        return json_response(found, less="a shorter text, or fewer positions")
