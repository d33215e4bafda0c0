"""The user's notes on latents: one small JSON file beside what they are about."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from mlsae import files, untrusted
from mlsae.errors import ConfigError, ResourceError
from mlsae.explorer.kept import Kept

if TYPE_CHECKING:
    from mlsae.explorer.library import Library

FILE = "notes.json"
MAX_CHARACTERS = 4000
MAX_BYTES = 8 << 20
"""Of all notes together."""


class NoteRequest(BaseModel):
    """The body that changes a note; an empty one takes it away."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    note: Annotated[str, Field(max_length=MAX_CHARACTERS)]


class Notes:
    """Notes by latent, in a folder; None: there is no place to keep any."""

    def __init__(self, folder: Path | None):
        self._path = None if folder is None else folder / FILE
        self._kept = Kept([] if self._path is None else [self._path], self._read)
        self._lock = threading.Lock()

    def of(self, latent: int) -> str:
        """The note on a latent; empty if there is none, or the file is damaged (see `problem`)."""
        notes = self._kept.get()
        return "" if notes is None else notes.get(str(latent), "")

    @property
    def problem(self) -> str | None:
        """Why the notes that there are cannot be read."""
        return self._kept.problem

    def write(self, latent: int, note: str) -> None:
        """Keep a note, durably; others that were written meanwhile stay.

        Raises:
            ConfigError: it is no text that a file can hold.
            ResourceError: there is no place for it, or the file that is there is not one of notes and would be lost.
        """
        if self._path is None:
            raise ResourceError("note", "an SAE from the Hub has no folder for notes; give --analysis DIR")
        try:
            note.encode()
        except UnicodeEncodeError as error:
            raise ConfigError("note", f"character {error.start} is half of a pair; leave it out") from None
        with self._lock:
            try:
                notes = self._read()
            except ConfigError as error:
                raise ResourceError("note", f"not saved: {FILE} is damaged ({error.problem}); move it away") from error
            notes = {key: text for key, text in notes.items() if key != str(latent)} | (
                {str(latent): note} if note else {}
            )
            if sum(len(text.encode()) + 16 for text in notes.values()) > MAX_BYTES // 2:  # JSON escapes some
                raise ResourceError("note", f"not saved: {FILE} would be too large; shorten others")
            try:
                files.write_json(self._path, {"notes": dict(sorted(notes.items(), key=lambda item: int(item[0])))})
            except ResourceError as error:
                raise ResourceError("note", f"not saved: {error.problem}") from error

    def _read(self) -> dict[str, str]:
        if self._path is None or not self._path.exists():
            return {}
        found = untrusted.read_json(self._path, MAX_BYTES)
        notes = found.get("notes") if isinstance(found, dict) else None
        if not isinstance(notes, dict) or not all(
            key.isdecimal() and key.isascii() and isinstance(text, str) for key, text in notes.items()
        ):
            raise ConfigError(FILE, "holds no notes by latent")
        return notes


def note_view(library: "Library", latent: int) -> dict[str, Any]:
    """/latents/{latent}/note."""
    return {"note": library.notes.of(library.checked_latent(latent))}


def put_note(library: "Library", latent: int, request: NoteRequest) -> dict[str, Any]:
    """Save a note; returns it."""
    library.notes.write(library.checked_latent(latent), request.note)
    return note_view(library, latent)
