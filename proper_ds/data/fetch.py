"""Downloads files that may break off: goes on where it stopped, checks sizes and sums, tries again a bounded time.

`lamp_files.py` says which files; this neither knows nor cares what they hold, but that they are JSON.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ijson

from proper_ds.data.files import MarkedBytes
from proper_ds.errors import DataError, FetchError
from proper_ds.files import write_json_atomic

RECORD = "fetched.json"
SUMS = "SHA256SUMS"
CHUNK_BYTES = 1 << 20
MAX_TRIES = 6
"""Requests in a row that bring not one byte more, before giving up."""
MAX_PAUSE_S = 30.0
_GONE = (401, 403, 404, 410)
_TROUBLE = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)

Progress = Callable[[str, int, int | None], None]


class Missing(Exception):  # noqa: N818 - a signal to the caller, who knows whether the file must be there
    """The server says that it has no such file."""


@dataclass(frozen=True)
class _Version:
    """What tells whether the server's file is still the one that was begun."""

    url: str
    etag: str | None
    modified: str | None
    num_bytes: int | None


class Fetcher:
    """Brings files of one server into one folder, and writes down what it brought in `fetched.json`."""

    def __init__(
        self,
        base_url: str,
        out: Path,
        timeout_s: float = 60.0,
        pause: Callable[[float], None] = time.sleep,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        """Raises DataError for an address that is none."""
        if not base_url.startswith(("http://", "https://")):
            raise DataError(f"{base_url!r} is no address to download from: it must begin with https:// or http://")
        self._base = base_url.rstrip("/") + "/"
        self._out = out
        self._timeout_s, self._pause, self._progress = timeout_s, pause, progress
        self._fetched: dict[str, dict[str, Any]] = _read_record(out / RECORD)
        self._sums: dict[str, str] | None = None

    def fetch(self, remote: str, name: str) -> bool:
        """Bring the file at `remote`, below the base address, as `name`; False where it was there and is whole.

        Raises:
            Missing: where the server has none.
            FetchError: where the connection kept failing; calling again goes on.
            DataError: where what came is no JSON, or has another checksum than the server's own list says; and where
                `name` is there, but is another file of the server's.
        """
        path = self._out / name
        if path.exists():
            known = self._fetched.get(name)
            if known is None:
                raise DataError(f"{path} is there, but was not fetched by this command; move it, or give another --out")
            if known.get("path") != remote:
                raise DataError(f"{path} was fetched from {known['url']}, not as {remote}; give another --out")
            if known["sha256"] == _sha256(path):
                return False
            logging.getLogger("proper_ds").warning("%s is not what was fetched; fetching it again", path)
            path.unlink()
        with _folder(self._out):
            self._bring(remote, name)
        return True

    def _bring(self, remote: str, name: str) -> None:
        path = self._out / name
        part = self._out / f".{name}.part"
        version = self._download(self._base + remote, part, name)
        digest = _sha256(part)
        wanted = self._listed_sums().get(remote)
        if wanted not in (None, digest):
            _discard(part)
            raise DataError(
                f"{version.url} has SHA-256 {digest}, but {self._base}{SUMS} says {wanted}; try again later"
            )
        part.replace(path)
        _discard(part)
        self._fetched[name] = asdict(version) | {
            "path": remote,
            "num_bytes": path.stat().st_size,
            "sha256": digest,
            "checked_by": SUMS if wanted else "size" if version.num_bytes is not None else "end of the JSON",
        }
        write_json_atomic(self._out / RECORD, {"files": self._fetched})

    def _download(self, url: str, part: Path, name: str) -> _Version:
        num_failed, pause_s, most = 0, 1.0, _size(part)
        while True:
            try:
                version = self._continue(url, part, name)
            except _TROUBLE as error:
                if _size(part) > most:  # more than ever: beginning anew time and again is no progress
                    num_failed, pause_s, most = 0, 1.0, _size(part)
                else:
                    num_failed += 1
                if num_failed == MAX_TRIES:
                    raise FetchError(f"{url}: {error}, {MAX_TRIES} times in a row; run it again to go on") from None
                self._wait(pause_s, url, error, num_failed)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                continue
            if not _begins_as_json(part):
                _discard(part)
                raise DataError(f"{url} brought a page, not JSON: the address, or the mirror's, is wrong")
            return version

    def _wait(self, pause_s: float, url: str, error: Exception, num_failed: int) -> None:
        """Wait before the next request, and say so: minutes may pass until the last one."""
        about = "%s: %s (%d of %d failures without progress); trying again in %g s"
        logging.getLogger("proper_ds").warning(about, url, error, num_failed, MAX_TRIES, pause_s)
        self._pause(pause_s)

    def _continue(self, url: str, part: Path, name: str) -> _Version:
        """One request for what is missing. Raises one of _TROUBLE where less than that came."""
        have = _size(part)
        begun = _read_version(part)
        if begun is not None and begun.url != url:
            begun = None
        if begun is not None and begun.num_bytes == have > 0:
            return begun  # all of it came, and the process ended before it could say so
        unchanged = begun and (begun.etag or begun.modified)
        headers = {"Accept-Encoding": "identity"}
        if have and unchanged:
            headers |= {"Range": f"bytes={have}-", "If-Range": unchanged}
        try:
            with self._open(url, headers) as response:
                start = have if response.status == 206 else 0
                if response.status == 206 and _start_of(response) != have:
                    _discard(part)  # begin again, and ask for no range
                    raise http.client.HTTPException(f"another range than that from byte {have:,} came")
                length = response.headers.get("Content-Length")
                total = None if length is None else start + int(length)
                etag = response.headers.get("ETag")
                strong = None if etag is None or etag.startswith("W/") else etag
                version = _Version(url, strong, response.headers.get("Last-Modified"), total)
                write_json_atomic(_version_path(part), asdict(version))
                with part.open("ab" if start else "wb") as file:
                    while chunk := response.read(CHUNK_BYTES):
                        file.write(chunk)
                        self._progress(name, file.tell(), total)
                    done = file.tell()
        except urllib.error.HTTPError as error:
            if error.code == 416:
                _discard(part)  # longer than what the server has: begin again
            raise
        if total is not None and done != total:
            if done > total:
                _discard(part)
            raise http.client.HTTPException(f"{done:,} of {total:,} bytes came")
        if total is None and _begins_as_json(part) and not _ends_as_json(part):
            raise http.client.HTTPException(f"after {done:,} bytes, whose number was not said, the JSON has no end")
        return version

    def _open(self, url: str, headers: dict[str, str]) -> Any:
        try:
            return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            if error.code in _GONE:
                raise Missing(f"{url}: the server says {error.code} {error.reason}") from None
            raise

    def _listed_sums(self) -> dict[str, str]:
        """The server's own checksums by path; none where it has no such list, as the official one has not."""
        if self._sums is None:
            found: dict[str, str] = {}
            for line in self._read_sums().splitlines():
                digest, _, path = line.partition(" ")
                if len(digest) == 64:
                    found[path.lstrip(" *").removeprefix("./")] = digest.lower()
            self._sums = found
        return self._sums

    def _read_sums(self) -> str:
        """The text of the server's list, "" where it says that it has none. Raises FetchError where it cannot say."""
        for number in range(1, MAX_TRIES + 1):
            try:
                with self._open(self._base + SUMS, {}) as response:
                    return str(response.read(CHUNK_BYTES).decode("utf-8", "replace"))
            except Missing as reason:
                logging.getLogger("proper_ds").info("no list of checksums: %s", reason)
                return ""
            except _TROUBLE as error:
                if number == MAX_TRIES:
                    raise FetchError(
                        f"{self._base}{SUMS}: {error}; what came cannot be checked, run it again"
                    ) from None
                self._wait(min(2.0 ** (number - 1), MAX_PAUSE_S), self._base + SUMS, error, number)
        raise AssertionError("unreachable")


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder and those above it; those of them that are left empty by a failure go again."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in new:
            if any(folder.iterdir()):
                break
            folder.rmdir()
        raise


def _start_of(response: Any) -> int | None:
    """The first byte that a partial answer holds: `Content-Range: bytes 100-199/200`."""
    word = str(response.headers.get("Content-Range", "")).removeprefix("bytes ").partition("-")[0]
    return int(word) if word.isdigit() else None


def _begins_as_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] in (b"[", b"{")


def _ends_as_json(path: Path) -> bool:
    """Whether a JSON value that begins at the start of the file is closed at its end."""
    with path.open("rb") as file:
        try:
            for _ in ijson.basic_parse(MarkedBytes(file)):
                pass
        except ijson.JSONError:
            return False
    return True


def _version_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_version(part: Path) -> _Version | None:
    try:
        return _Version(**json.loads(_version_path(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_path(part).unlink(missing_ok=True)


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it with the files beside it") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
