"""What comes in and goes out: JSON without NaN and of bounded size, one shape for every error, and strict numbers."""

import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticSerializationError, to_json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from mlsae.errors import ConfigError, DataError, MlsaeError, ModelError, out_of_memory
from mlsae.untrusted import MAX_JSON_DEPTH, parse_json

RESPONSE_BYTES = 2 << 20
"""Of an answer."""
MAX_DOSE = 1e4
RETRY_AFTER_SECONDS = 2
_SHOWN = 100
_FOLDERS = re.compile(r"(?<![\w.:/\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"/\\]+[/\\])+")
"""The folders of an absolute path, whose last name stays."""

M = TypeVar("M", bound=BaseModel)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _spelled(text: Any, pattern: str, allowed: str) -> str:
    if not (isinstance(text, str) and re.fullmatch(pattern, text)):
        raise ValueError(allowed)
    return text


def index_of(text: Any) -> int:
    """The number that `0`, `7` or `196607` spells; no sign, blank, leading zero, point, exponent or other digits."""
    return int(_spelled(text, r"0|[1-9][0-9]{0,19}", "a whole number from 0, as in 7"))


def number_of(text: Any) -> float:
    """The finite number that a text like `-1.5` or `2e-3` spells. Raises ValueError for anything else."""
    allowed = "a finite number, as in 0.5"
    number = float(_spelled(text, r"-?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?", allowed))
    if abs(number) == float("inf"):
        raise ValueError(allowed)
    return number


def _flag_of(text: Any) -> bool:
    return _spelled(text, "true|false", "true or false") == "true"


def _dose(number: float) -> float:
    if not abs(number) <= MAX_DOSE:
        raise ValueError(f"a finite number from -{MAX_DOSE:g} to {MAX_DOSE:g}")
    return number


Index = Annotated[int, Field(strict=True, ge=0)]
"""A latent, layer or position in a JSON body: an integer from 0, and neither true, 1.0 nor "1"; the view knows its end."""
Dose = Annotated[float, Field(strict=True), AfterValidator(_dose)]
"""Of a steered latent, in a JSON body: finite, at most 1e4 away from 0."""
QueryIndex = Annotated[int, BeforeValidator(index_of)]
"""An Index in a path or a query, where everything is text."""
QueryNumber = Annotated[float, BeforeValidator(number_of)]
"""A finite number in a query."""
QueryFlag = Annotated[bool, BeforeValidator(_flag_of)]
"""`true` or `false` in a query."""


# ---- in --------------------------------------------------------------------------------------------------------------


def parse(model: type[M], body: bytes) -> M:
    """A JSON body as its pydantic model.

    Raises:
        ConfigError: it is not UTF-8 or JSON, holds NaN, half a surrogate pair or a key twice, or is nested deeper than 32 levels.
        ValidationError: a field is missing, unknown or refused.
    """
    try:
        value = parse_json(body.decode("utf-8"), Path("body"))
        to_json(value)
    except UnicodeDecodeError as error:
        raise ConfigError("body", f"byte {error.start}: not UTF-8") from None
    except ConfigError as error:
        deep = error.problem.startswith("nested deeper")
        raise ConfigError("body", f"nested deeper than {MAX_JSON_DEPTH} levels" if deep else error.problem) from None
    except PydanticSerializationError:
        raise ConfigError("body", "a text in it has half of a surrogate pair; give valid Unicode") from None
    return model.model_validate(value)


# ---- out -------------------------------------------------------------------------------------------------------------


def json_bytes(value: Any, less: str = "a smaller part") -> bytes:
    """A plain value as JSON in UTF-8: NaN and infinity are null, half a surrogate pair is spelled `\\ud800`.

    `less` says what to ask for instead. Raises ConfigError for more than 2 MB.
    """
    try:
        data = to_json(value, inf_nan_mode="null")
    except PydanticSerializationError as error:
        if "surrogates not allowed" not in str(error):
            raise
        data = to_json(_escaped(value), inf_nan_mode="null")
    if len(data) > RESPONSE_BYTES:
        raise ConfigError("answer", f"{len(data):,} bytes; at most {RESPONSE_BYTES:,} are sent; ask for {less}")
    return data


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


def json_response(value: Any, status: int = 200, less: str = "a smaller part") -> Response:
    """`json_bytes` as a response."""
    return Response(json_bytes(value, less), status, media_type="application/json")


# ---- errors ----------------------------------------------------------------------------------------------------------


class Refused(MlsaeError):
    """A request that is answered with an error: `status` of HTTP, what was given, and what is allowed."""

    def __init__(self, status: int, field: str, given: str | None, allowed: str):
        super().__init__(field, allowed)
        self.status = status
        self.given = given


def shape(field: str, given: str | None, allowed: str) -> dict[str, Any]:
    """The one shape of every error."""
    return {"error": {"field": field, "given": None if given is None else given[:_SHOWN], "allowed": allowed}}


def error_of(error: BaseException) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the body that tell of an error: no traceback, and no path of this machine.

    A class of ours may say its own status in an attribute `status`.
    """
    if isinstance(error, Refused):
        return error.status, shape(error.field, error.given, error.problem)
    if isinstance(error, MlsaeError):
        status = getattr(error, "status", 409 if isinstance(error, ModelError | DataError) else 422)
        return status, shape(_without_folders(error.field), None, _without_folders(error.problem))
    if isinstance(error, RequestValidationError):
        return 422, _invalid(error.errors(), skip=1)
    if isinstance(error, ValidationError):
        return 422, _invalid(error.errors(include_url=False, include_context=False), skip=0)
    if isinstance(error, HTTPException):
        field = {404: "path", 405: "method"}.get(error.status_code, "request")
        known = {404: "nothing is here", 405: f"{(error.headers or {}).get('Allow', 'another method')} here"}
        return error.status_code, shape(field, None, known.get(error.status_code, error.detail))
    if out_of_memory(error):
        return 503, shape("memory", None, "not enough for this; free some, or ask for less")
    return 500, shape("server", None, f"a bug in mlsae ({type(error).__name__}); its terminal says more")


def _invalid(errors: Sequence[Any], skip: int) -> dict[str, Any]:
    """The first of pydantic's errors; `skip` leaves out where FastAPI found it (path, query, body)."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"][skip:]) or "body"
    given = None if first["type"] == "missing" else repr(first.get("input"))
    return shape(field[:_SHOWN], given, first["msg"].removeprefix("Value error, "))


def _without_folders(text: str) -> str:
    return _FOLDERS.sub("", text)


def navigates(scope: Scope) -> bool:
    """Whether a person asked for this, in the address bar or by a link, and not a script."""
    headers = Headers(scope=scope)
    dest = headers.get("sec-fetch-dest")
    return dest == "document" or (dest is None and "text/html" in headers.get("accept", ""))


def shape_errors(app: FastAPI, page: Callable[[int, dict[str, Any]], Response] | None = None) -> None:
    """Make every failure of an app's routes one of `error_of`; a bug is raised once more, for the guard to log.

    `page` shows it to a person whose browser asked for a page, and not a script for numbers.
    """

    async def answer(request: Request, error: Exception) -> Response:
        status, body = error_of(error)
        if page is not None and navigates(request.scope):
            response = page(status, body)
        else:
            response = json_response(body, status)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        if isinstance(error, HTTPException):
            response.headers.update(error.headers or {})
        return response

    for kind in (MlsaeError, RequestValidationError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
