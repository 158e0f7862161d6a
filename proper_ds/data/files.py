"""Opening input files: gzip or plain, with invalid UTF-8 marked so that one bad record does not lose the rest."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

BAD_TEXT = "\ufdd0"
"""Stands where bytes were no UTF-8. A Unicode noncharacter: no honest text holds it."""

BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)
"""What a truncated or damaged gzip file raises while being read."""

_ESCAPED = re.compile("[\udc80-\udcff]+")
_SURROGATE = re.compile("[\ud800-\udfff]")


class MarkedBytes:
    """A binary reader that hands out valid UTF-8, with BAD_TEXT where the source was not."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")

    def read(self, size: int = -1) -> bytes:
        """Up to about `size` bytes; b"" at the end."""
        while True:
            chunk = self._raw.read(size)
            text = self._decoder.decode(chunk, final=not chunk)
            if text:
                return _ESCAPED.sub(BAD_TEXT, text).encode("utf-8")
            if not chunk:
                return b""


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, unpacking `.gz`."""
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as file:
            yield cast("IO[bytes]", file)
    else:
        with path.open("rb") as file:
            yield file


def has_bad_text(value: Any) -> bool:
    """Whether any text inside a JSON value held invalid UTF-8, or half of a surrogate pair (an emoji cut in two)."""
    if isinstance(value, str):
        return BAD_TEXT in value or _SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(has_bad_text(key) or has_bad_text(inner) for key, inner in value.items())
    if isinstance(value, list):
        return any(has_bad_text(inner) for inner in value)
    return False


def stem_of(path: Path) -> str:
    """The file name without `.gz` and its format's ending."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]
