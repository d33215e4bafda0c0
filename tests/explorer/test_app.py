"""The real routes: pages and their twins tell the same, numbers are those of the files, and whatever is asked, nothing breaks."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Mount

from explorer.conftest import N_LATENTS, PROMPT
from explorer.payloads import PAYLOADS, replaced
from explorer.sites import BAD_HOSTS, BAD_ORIGINS, BEARER, HOST, JSON, Ask, Guarded, requests_of
from mlsae.errors import ResourceError
from mlsae.explorer import app, open_explorer
from mlsae.explorer.app import create_app
from mlsae.explorer.library import Library


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, on which notes may be made."""
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("site") / "run"))


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[httpx.Client]:
    """Signed in as a script."""
    with (
        open_explorer(run) as running,
        httpx.Client(base_url=running.url, headers={"authorization": f"Bearer {running.token}"}, timeout=30) as client,
    ):
        yield client


class Page(HTMLParser):
    """The elements of a page, and the text of its data block."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.data, self.text, self._in_data = "", "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self._in_data = ("id", "data") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_data:
            self.data += data


# ---- pages and twins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["/overview", "/latents/0", f"/latents/{N_LATENTS - 1}"])
def test_a_page_holds_what_its_twin_says(client: httpx.Client, page: str):
    assert json.loads(Page(client.get(page).text).data) == client.get(f"{page}.json").json()


def test_the_root_leads_to_the_overview(client: httpx.Client):
    answer = client.get("/")
    assert (answer.status_code, answer.headers["location"]) == (303, "/overview")


def test_the_overview_has_the_numbers_of_the_files(client: httpx.Client, run: Path):
    page = client.get("/overview.json").json()
    assert page["evaluation"] == json.loads((run / "evaluation.json").read_text())
    assert page["similarity"] == json.loads((run / "analysis" / "similarity.json").read_text())
    summary = json.loads((run / "analysis" / "summary.json").read_text())
    assert all(page["statistics"][name] == summary[name] for name in ("decomposition", "events", "nulls"))


def test_a_search_and_the_latents_pages_have_the_numbers_of_the_table(client: httpx.Client, run: Path):
    table = pq.read_table(run / "analysis" / "latents.parquet").to_pylist()
    rows = client.get("/search.json", params={"sort": "latent", "limit": 200}).json()["rows"]
    for row, known in zip(rows, table, strict=True):
        page = client.get(f"/latents/{known['latent']}.json").json()["summary"]
        for name in ("centre_of_mass", "effective_layers"):
            shown = [row[name], page[name]["value"]]
            assert shown == ([None] * 2 if known[name] is None else pytest.approx([known[name]] * 2, rel=1e-6))
        assert row["n_events"] == page["n_events"] == known["n_events"]


def test_by_get_and_by_post_a_prompt_is_answered_alike(client: httpx.Client):
    for path, asked in (
        ("/prompt.json", {"text": PROMPT, "latent": 3, "top": 2}),
        ("/compare.json", {"text": PROMPT, "other": "a dog"}),
        ("/logits.json", {"text": PROMPT, "start": 1, "stop": 3, "top": 2}),
    ):
        assert client.get(path, params=asked).json() == client.post(path, json=asked).json()  # ty: ignore[invalid-argument-type]


def test_edits_are_spelled_in_a_link_as_in_a_body(client: httpx.Client):
    edits = [{"latent": 3, "layers": [0, 2], "op": "add", "dose": 1.5}, {"latent": 4, "op": "ablate", "dose": 0.0}]
    asked = {"text": PROMPT, "edits": edits, "n_new": 2}
    by_post = client.post("/steer.json", json=asked).json()
    linked = {"text": PROMPT, "edit": ["3:0,2:add:1.5", "4:all:ablate"], "n_new": 2}
    by_get = client.get("/steer.json", params=linked).json()  # ty: ignore[invalid-argument-type]
    assert by_get | {"seconds": 0} == by_post | {"seconds": 0}


def test_a_note_is_kept_and_shown(client: httpx.Client):
    assert client.put("/latents/5/note", json={"note": "ends of lines"}).json() == {"note": "ends of lines"}
    assert client.get("/latents/5.json").json()["note"] == client.get("/latents/5/note.json").json()["note"]


def test_people_get_a_page_of_an_error_and_scripts_its_shape(client: httpx.Client):
    for path, status in (("/latents/999999", 422), ("/latents/x", 422), ("/nowhere", 404)):
        person = client.get(path, headers={"accept": "text/html"})
        script = client.get(path)
        assert person.status_code == script.status_code == status
        assert Page(person.text).elements[0][0] == "html"
        assert script.json()["error"]["allowed"] in Page(person.text).text


def test_every_path_in_the_pages_is_there(client: httpx.Client):
    for page in ("/overview", "/prompt", "/search", "/steer", "/logits", "/latents/3"):
        for path in re.findall(r'(?:src|href)="(/[^"#?]*)', client.get(page).text):
            assert client.get(path).status_code != 404, path


def test_modules_import_only_what_is_installed(client: httpx.Client):
    for module in (app.HERE / "static" / "js").rglob("*.js"):
        source = module.read_text()
        for name in re.findall(r'^import\b[^;"]*"([^"]+)";$', source, re.M) + re.findall(
            r'\bimport\("([^"]+)"\)', source
        ):
            assert name.startswith(("./", "../")), f"{module.name} imports {name} from elsewhere"
            assert (module.parent / name).is_file(), f"{module.name} imports {name}"


def test_pages_that_are_not_installed_are_said_at_the_start(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "HERE", tmp_path)
    with pytest.raises(ResourceError, match="is not installed; run 'pip install"):
        create_app(Library.open(run))


# ---- the guard before the real routes --------------------------------------------------------------------------------


@pytest.fixture
def guarded_app(run: Path) -> Guarded:
    return Guarded(create_app(Library.open(run)))


def test_no_real_route_is_reached_under_another_name_or_from_another_origin_or_without_the_token(guarded_app: Guarded):
    asks = []
    for method, path in requests_of(guarded_app.app):
        asks += [Ask(method, path, [BEARER, JSON, *(("host", host) for host in hosts)]) for hosts in BAD_HOSTS]
        asks += [Ask(method, path, [BEARER, JSON, ("host", HOST), ("origin", origin)]) for origin in BAD_ORIGINS]
        asks += [Ask("OPTIONS", path, [BEARER, ("host", HOST), ("origin", BAD_ORIGINS[0])])]
        asks += [] if path in ("/health", "/signin") else [Ask(method, path, [JSON, ("host", HOST)])]
    for ask, answer in zip(asks, guarded_app.ask(asks), strict=True):
        assert answer.status in (401, 403, 405, 421), ask
        assert not any(name.startswith("access-control") for name, _ in answer.headers)
    assert guarded_app.passed == []
    assert len(asks) > 500


def test_every_route_can_be_asked_for_and_documents_itself_nowhere(guarded_app: Guarded):
    routes = guarded_app.app.routes
    assert {route.path for route in routes if isinstance(route, Mount)} == {app.static_root()}
    assert not any("openapi" in path or "docs" in path for _, path in requests_of(guarded_app.app))
    assert {method for method, _ in requests_of(guarded_app.app)} == {"GET", "POST", "PUT"}


# ---- whatever is asked -----------------------------------------------------------------------------------------------

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(
        ["0", "-1", "1e400", "NaN", "../../etc/passwd", "http://evil.example/", "٣", "3:all:add:2", "a" * 3000]
    ),
)
deep = st.recursive(
    anything, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
FIELDS = ["text", "other", "latent", "top", "edits", "edit", "reconstruct", "n_new", "pos", "start", "stop", "layer"]
FIELDS += ["n", "note", "since_step", "width", "sort"]


def answered(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"].keys() == {"field", "given", "allowed"}
    assert "Traceback" not in answer.text
    assert "site-packages" not in answer.text


ways = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ways
@given(
    st.sampled_from(["/prompt.json", "/compare.json", "/steer.json", "/logits.json"]),
    st.dictionaries(st.sampled_from(FIELDS), deep, max_size=5) | deep,
    st.booleans(),
)
def test_any_json_is_answered_without_a_bug(client: httpx.Client, path: str, body: Any, with_text: bool):
    if with_text and isinstance(body, dict):
        body = {"text": PROMPT} | body
    answered(client.post(path, content=json.dumps(body), headers=dict([JSON])))


@ways
@given(st.data())
def test_any_query_is_answered_without_a_bug(client: httpx.Client, data: st.DataObject):
    paths = ["/heatmap.bin", "/training.json", "/search.json", "/latents/3.json", "/latents/3/neighbours.json"]
    paths += ["/prompt.json", "/compare.json", "/steer.json", "/logits.json", "/overview", "/latents/3"]
    path = data.draw(st.sampled_from(paths))
    names = [*FIELDS, "centre_min", "birth_max", "token", "promoted", "descending", "offset", "limit"]
    query = data.draw(st.dictionaries(st.sampled_from(names), anything.map(str), max_size=4))
    query = {name: text.encode("utf-8", "replace").decode() for name, text in query.items()}
    answer = client.get(path, params=({"text": PROMPT} if data.draw(st.booleans()) else {}) | query)
    assert answer.status_code < 500, answer.text
    if answer.headers["content-type"] == "application/json":
        answered(answer)


@ways
@given(anything.map(str))
def test_any_latent_is_answered_without_a_bug(client: httpx.Client, latent: str):
    for suffix in ("", ".json", "/neighbours.json", "/logits.json", "/coactive.json"):
        answer = client.get(
            httpx.URL(client.base_url).copy_with(raw_path=b"/latents/" + _quoted(latent) + suffix.encode())
        )
        assert answer.status_code < 500, answer.text


def _quoted(text: str) -> bytes:
    return b"".join(b"%%%02X" % byte for byte in text.encode("utf-8", "replace"))


# ---- no text becomes markup ------------------------------------------------------------------------------------------

NOTE = [{"what": "what", "why": "why", "command": "mlsae analyze"}]
SITE = {"name": "name", "lm": "lm", "n_latents": 7, "layers": ["0", "1"]}
ERROR = {"error": {"field": "text", "given": "given", "allowed": "allowed"}}
PAGE = {"accept": "text/html"}


@pytest.fixture(scope="module")
def place(run: Path, client: httpx.Client) -> Callable[[str, str], bytes]:
    """A page with a text at one of seven places."""
    library = Library.open(run)
    latent, overview = app.latent_view(library, 3), app.overview_view(library)
    stranger = Guarded(create_app(library))

    def rendered(page: str, data: Any, text: str, **site: Any) -> bytes:
        return app.rendered(page, SITE | site, replaced(data, repeat(text)))

    def raw(text: str) -> str:
        return "".join(each if "!" <= each <= "~" else _quoted(each).decode() for each in text)

    return lambda name, text: {
        "token": lambda: rendered("latent", latent | {"missing": NOTE}, text),
        "dataset text": lambda: rendered("overview", overview | {"missing": NOTE}, text),
        "LM name": lambda: rendered("prompt", {"missing": []}, "", lm=f"lm{text}", name=f"name{text}"),
        "layer label": lambda: rendered("search", {"missing": []}, "", layers=[f"0{text}", f"1{text}"]),
        "error": lambda: rendered("error", ERROR, text),
        "prompt": lambda: client.get(f"/prompt?text={_quoted(text).decode()}", headers=PAGE).content,
        "URL": lambda: stranger.one("GET", f"/{raw(text)}?{raw(text)}", *PAGE.items()).body,
    }[name]()


@pytest.mark.parametrize("name", ["token", "prompt", "LM name", "layer label", "dataset text", "error", "URL"])
def test_no_text_in_any_place_of_a_page_becomes_markup(place: Callable[[str, str], bytes], name: str):
    benign = Page(place(name, "benign").decode())
    seen = {
        "LM name": "lm{}: 7 latents",
        "error": "given{}",
        "dataset text": "Missing: what{}.",
        "token": "Missing: what{}.",
    }
    for payload in PAYLOADS:
        hostile, shown = Page(place(name, payload).decode()), payload.encode("utf-8", "backslashreplace").decode()
        assert hostile.elements == benign.elements, payload
        if name != "URL":
            assert json.loads(hostile.data) == json.loads(benign.data.replace("benign", json.dumps(shown)[1:-1])), (
                payload
            )
        assert seen.get(name, "").format(shown) in hostile.text, payload
    assert len(PAYLOADS) >= 40


def test_no_script_makes_markup_of_text():
    sources = {path: path.read_text() for path in (app.HERE / "static" / "js").rglob("*.js")}
    assert len(sources) > 10
    for path, source in sources.items():
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", source
        )
        assert not found, f"{path.name}: {found}"
    for path in (app.HERE / "templates").rglob("*.html"):
        assert "|safe" not in path.read_text().replace(" ", "")
        assert not re.findall(r'\sstyle=|\son\w+="|<script>(?!</)', path.read_text()), path.name
