"""Answers: JSON that every parser takes, errors of one shape without a path, and numbers that are what they say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

from explorer.sites import BEARER, HOST, JSON, N_LATENTS, Ask, Guarded, small_site
from mlsae.errors import ConfigError, DataError, ModelError, ResourceError
from mlsae.explorer.answers import (
    Dose,
    Index,
    QueryFlag,
    QueryIndex,
    QueryNumber,
    Refused,
    error_of,
    json_bytes,
    parse,
)


class Edit(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    latent: Index
    dose: Dose = 1.0


class Steer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str
    edits: list[Edit] = []


@pytest.fixture
def small(tmp_path: Path) -> Guarded:
    return Guarded(small_site(tmp_path / "static"))


def accepts(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


# ---- numbers ---------------------------------------------------------------------------------------------------------

NO_INDEX = [-1, -(2**31), 1.5, 1.0, 0.0, -0.0, "0", "7", True, False, None, [], {}, math.nan, math.inf, b"7"]
NO_DOSE = [math.nan, math.inf, -math.inf, 1e400, 1e5, 10001, -10000.5, 10**30, "1", True, False, None, [1.0], {}]


@pytest.mark.parametrize("value", NO_INDEX)
def test_an_index_is_an_integer_from_0_and_nothing_like_it(value: Any):
    assert not accepts(Index, value)


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**53 + 1, 2**64])
def test_an_index_is_exactly_what_was_sent(value: int):
    assert TypeAdapter(Index).validate_python(value) == value


@pytest.mark.parametrize("value", NO_DOSE)
def test_a_dose_is_a_finite_number_of_bounded_size(value: Any):
    assert not accepts(Dose, value)


@pytest.mark.parametrize("value", [0, -0.0, 1, 1.5, -1e4, 10_000, 1e-300])
def test_a_dose_is_exactly_what_was_sent(value: float):
    got = TypeAdapter(Dose).validate_python(value)
    assert (got, math.copysign(1, got)) == (value, math.copysign(1, value))


NO_QUERY_INDEX = [
    "7.5",
    "",
    "0x7",
    " 7",
    "7 ",
    "1e3",
    "-1",
    "٣",
    "７",
    "+7",
    "07",
    "1_000",
    "7\n",
    "true",
    "9" * 30,
    7,
    None,
]


@pytest.mark.parametrize("text", NO_QUERY_INDEX)
def test_one_spelling_of_an_index_in_a_query(text: Any):
    assert not accepts(QueryIndex, text)


@pytest.mark.parametrize("text", ["0", "7", "196607", str(2**53 + 1), str(2**64)])
def test_an_index_in_a_query_is_what_it_spells(text: str):
    assert str(TypeAdapter(QueryIndex).validate_python(text)) == text


@pytest.mark.parametrize(
    "text", ["", "nan", "inf", "1e400", "-1e999", "0x1p3", "1,5", " 1", "٣", "1_0", "--1", ".5", "5.", 1.5]
)
def test_a_number_in_a_query_is_finite_and_plain(text: Any):
    assert not accepts(QueryNumber, text)


@pytest.mark.parametrize("text", ["0", "-1.5", "2e-3", "12.25E+2", "7"])
def test_a_number_in_a_query_is_what_it_spells(text: str):
    assert TypeAdapter(QueryNumber).validate_python(text) == float(text)


def test_a_flag_in_a_query_is_true_or_false():
    assert [TypeAdapter(QueryFlag).validate_python(text) for text in ("true", "false")] == [True, False]
    assert not any(accepts(QueryFlag, text) for text in ("True", "1", "0", "", "yes", "false\n", True, None))


def post(small: Guarded, body: str) -> tuple[int, Any]:
    headers = [("host", HOST), BEARER, JSON]
    answer = small.ask([Ask("POST", "/steer.json", headers, [body.encode()])])[0]
    return answer.status, json.loads(answer.body)


RAW_INTEGERS = ["-1", "2147483648", "-2147483648", "9007199254740993", "18446744073709551616", "1" + "0" * 30, "1.5"]
RAW_INTEGERS += ['"0"', "true", "null", "1.0", "1e0", "NaN", str(N_LATENTS), "1" + "0" * 5000]
RAW_FACTORS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "true", "null", '"1"', "10001", "1" + "0" * 30, "[]"]


@pytest.mark.parametrize("raw", RAW_INTEGERS)
def test_integers_in_a_body_are_strict(small: Guarded, raw: str):
    status, body = post(small, f'{{"text": "a", "edits": [{{"latent": {raw}}}]}}')
    assert status == 422
    assert set(body["error"]) == {"field", "given", "allowed"}


@pytest.mark.parametrize("raw", ["0", str(N_LATENTS - 1)])
def test_the_first_and_the_last_latent_are_allowed(small: Guarded, raw: str):
    assert post(small, f'{{"text": "a", "edits": [{{"latent": {raw}, "dose": -0.0}}]}}')[0] == 200


@pytest.mark.parametrize("raw", RAW_FACTORS)
def test_factors_in_a_body_are_strict(small: Guarded, raw: str):
    status, body = post(small, f'{{"text": "a", "edits": [{{"latent": 0, "dose": {raw}}}]}}')
    assert status == 422
    assert body["error"]["field"] in ("body", "edits.0.dose")


@pytest.mark.parametrize("text", NO_QUERY_INDEX[:-2])
def test_integers_in_a_path_or_a_query_are_strict(tmp_path: Path, text: str):
    client = TestClient(small_site(tmp_path / "static"))
    answer = client.get("/latents/3.json", params={"layer": text})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "layer")
    if text.strip():
        answer = client.get("/latents/" + "".join(f"%{byte:02x}" for byte in text.encode()) + ".json")
        assert (answer.status_code, answer.json()["error"]["field"]) == (422, "latent")


# ---- in --------------------------------------------------------------------------------------------------------------

BAD_BODIES = {
    "empty": (b"", "not JSON"),
    "white": (b" \n", "not JSON"),
    "two": (b"{}{}", "not JSON"),
    "cut": (b'{"text": "a', "not JSON"),
    "NaN": (b'{"text": "a", "dose": NaN}', "holds NaN, which is not JSON"),
    "minus infinity": (b"[-Infinity]", "holds -Infinity"),
    "twice": (b'{"text": "a", "text": "b"}', "key 'text' stands twice"),
    "twice, deep": (b'{"text": "a", "edits": [{"latent": 1, "latent": 2}]}', "key 'latent' stands twice"),
    "deep": (b"[" * 33 + b"]" * 33, "nested deeper than 32 levels"),
    "very deep": (b"[" * 100_000, "nested deeper than 32 levels"),
    "not UTF-8": (b'{"text": "\xff"}', "byte 10: not UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "byte 0: not UTF-8"),
    "BOM": (b'\xef\xbb\xbf{"text": "a"}', "BOM"),
    "half a pair": (b'{"text": "a\\ud800"}', "half of a surrogate pair"),
    "half a pair in a key": (b'{"a\\udc00": [1]}', "half of a surrogate pair"),
    "long number": (b'{"text": ' + b"9" * 5000 + b"}", "digits"),
}


@pytest.mark.parametrize("kind", BAD_BODIES)
def test_a_body_that_is_not_plain_json_is_refused(kind: str):
    body, message = BAD_BODIES[kind]
    with pytest.raises(ConfigError, match=message) as caught:
        parse(Steer, body)
    assert (caught.value.field, error_of(caught.value)[0]) == ("body", 422)


def test_a_body_is_read_as_it_stands():
    assert parse(Steer, b'{"text": "\\u00e9", "edits": [{"latent": 7, "dose": 2}]}') == Steer(
        text="é", edits=[Edit(latent=7, dose=2.0)]
    )


@pytest.mark.parametrize(
    ("body", "field", "given"),
    [
        ("{}", "text", None),
        ("[]", "body", "[]"),
        ("null", "body", "None"),
        ('{"text": 3}', "text", "3"),
        ('{"text": "a", "path": "/etc/passwd"}', "path", "'/etc/passwd'"),
        ('{"text": "a", "edits": [{"latent": 0}, {"latent": "7"}]}', "edits.1.latent", "'7'"),
        ('{"text": ["%s"]}' % ("a" * 500), "text", "['" + "a" * 98),
        ('{"text": "a", "%s": 0}' % ("k" * 500), "k" * 100, "0"),
    ],
)
def test_an_error_names_the_field_and_what_was_given(body: str, field: str, given: str | None):
    with pytest.raises(ValidationError) as caught:
        parse(Steer, body.encode())
    status, answer = error_of(caught.value)
    assert (status, answer["error"]["field"], answer["error"]["given"]) == (422, field, given)
    assert answer["error"]["allowed"]
    json_bytes(answer)


# ---- out -------------------------------------------------------------------------------------------------------------


def test_json_is_null_where_a_number_is_not_finite_and_exact_elsewhere():
    value = {
        "a": [math.nan, math.inf, -math.inf, 0.1, 1e-300, -0.0, 2**53 + 1],
        "é": "\u2028</script>",
        "b": (True, None),
    }
    got = json.loads(json_bytes(value).decode("utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert got == {"a": [None, None, None, 0.1, 1e-300, 0.0, 2**53 + 1], "é": "\u2028</script>", "b": [True, None]}


def test_half_a_surrogate_pair_does_not_break_an_answer():
    value = {"k\ud800": ["a\udfff", math.nan, {"b": ("\ud83d\ude00",)}], "c": "😀"}
    assert json.loads(json_bytes(value).decode("utf-8"))["k\\ud800"][:2] == ["a\\udfff", None]


def test_what_is_not_plain_is_a_bug_and_not_a_guess():
    with pytest.raises(ValueError, match="Unable to serialize"):
        json_bytes({"a": object()})


def test_an_answer_has_at_most_two_megabytes():
    assert len(json_bytes("x" * ((2 << 20) - 2))) == 2 << 20
    with pytest.raises(ConfigError, match=r"2,097,153 bytes; at most 2,097,152 are sent; ask for less text") as caught:
        json_bytes("x" * ((2 << 20) - 1), "less text")
    assert error_of(caught.value)[0] == 422


# ---- errors ----------------------------------------------------------------------------------------------------------


class Busy(ResourceError):
    status = 503


@pytest.mark.parametrize(
    ("error", "status", "field"),
    [
        (ConfigError("latent", "9 is out of range"), 422, "latent"),
        (ModelError("sae", "no SAE yet"), 409, "sae"),
        (DataError("examples", "damaged"), 409, "examples"),
        (ResourceError("note", "not writable"), 422, "note"),
        (Busy("queue", "full"), 503, "queue"),
        (Refused(415, "Content-Type", "text/plain", "application/json"), 415, "Content-Type"),
        (HTTPException(404), 404, "path"),
        (HTTPException(405, headers={"Allow": "GET"}), 405, "method"),
        (MemoryError(), 503, "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503, "memory"),
        (KeyError("secret"), 500, "server"),
    ],
)
def test_every_error_has_its_status_and_the_one_shape(error: Exception, status: int, field: str):
    got, body = error_of(error)
    assert (got, list(body), list(body["error"])) == (status, ["error"], ["field", "given", "allowed"])
    assert body["error"]["field"] == field
    assert body["error"]["allowed"]
    assert "secret" not in str(body)


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        ("/home/me/runs/x/sae.safetensors failed its checksum", "sae.safetensors failed its checksum"),
        ("'/tmp/run/analysis' is not there; run mlsae analyze", "'analysis' is not there; run mlsae analyze"),
        ("could not open (/root/a/b.json)", "could not open (b.json)"),
        (r"C:\Users\me\run is locked", "run is locked"),
        ("~/runs/x is a file", "x is a file"),
        ("EleutherAI/pythia-70m-deduped is not cached", "EleutherAI/pythia-70m-deduped is not cached"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("3/4 of runs/x/y", "3/4 of runs/x/y"),
    ],
)
def test_no_folder_of_this_machine_is_told(problem: str, shown: str):
    assert error_of(ModelError("sae", problem))[1]["error"]["allowed"] == shown
    assert "/home" not in str(error_of(ModelError("/home/me/run", "x")))


def test_an_app_answers_every_failure_in_the_one_shape(small: Guarded):
    for method, path, status, field in [
        ("GET", "/nowhere", 404, "path"),
        ("GET", "/static/nowhere.css", 404, "path"),
        ("POST", "/overview", 405, "method"),
        ("GET", "/latents/x.json", 422, "latent"),
        ("GET", f"/latents/{N_LATENTS}.json", 422, "latent"),
        ("GET", "/search.json?limit=201", 422, "limit"),
        ("GET", "/search.json?descending=1", 422, "descending"),
    ]:
        answer = small.one(method, path, BEARER, JSON)
        body = json.loads(answer.body)
        assert (answer.status, list(body), body["error"]["field"]) == (status, ["error"], field)


def test_being_busy_says_when_to_ask_again(tmp_path: Path):
    app = small_site(tmp_path / "static")

    @app.get("/busy")
    async def busy() -> None:
        raise Busy("queue", "16 wait")

    answer = Guarded(app).one("GET", "/busy", BEARER)
    assert (answer.status, answer.header("retry-after")) == (503, "2")
