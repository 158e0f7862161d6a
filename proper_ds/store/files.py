"""The store's file layer: local and shared file systems by system calls, object stores through fsspec.

Packs and the catalog read and write through it alone. Names are relative to the store, with `/` between parts.
"""

from __future__ import annotations

import errno
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proper_ds.errors import StoreError
from proper_ds.files import sync_folder

EXCLUSIVE_CREATE = ("memory", "s3", "s3a", "gs", "gcs")
"""Remote protocols whose `pipe_file(mode="create")` is a conditional put."""
MAX_OPEN_FILES = 64
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a file to read, and where to.

    Attributes:
        start: bytes from the beginning of the file.
        target: uint8 array to fill; its length is the length of the stretch.
    """

    name: str
    start: int
    target: np.ndarray


class Files(ABC):
    """What the store needs of a place to keep files.

    `create` is the commit: of any number of writers of one name exactly one is told that it won, and readers see all
    of its bytes or none.

    - Local disk, NFS, Lustre, CephFS: a synced temporary file, given its name by `link`, which fails where the name is
      taken. The file and its folder are synced, so what was committed survives a power cut.
    - S3 and GCS: one conditional put (`If-None-Match: *`, `ifGenerationMatch=0`).
    - `memory://`: within one process.
    - Any other protocol is refused: two writers could both win there.
    """

    location: str

    @abstractmethod
    def listing(self, folder: str) -> dict[str, int]:
        """Bytes by name of the files in a folder, sorted by name, temporary files among them; {} without a folder."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Whole files. Raises FileNotFoundError."""
        return [self.read(name) for name in names]

    @abstractmethod
    def read_into(self, spans: Sequence[Span]) -> None:
        """Fill every span's target.

        Raises:
            FileNotFoundError: where a file is missing.
            StoreError: where it is too short.
        """

    @abstractmethod
    def write(self, name: str, chunks: Iterable[Any]) -> int:
        """Write a file durably from chunks of bytes under a name nobody else uses; returns its bytes.

        Nothing is left where a chunk cannot be had.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Commit a file; False where the name is taken already."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Delete files; those that are gone already are fine."""

    def forget_handles(self) -> None:  # noqa: B027
        """Close files kept open for reading, so that deleted ones give their space back."""


class LocalFiles(Files):
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.location = str(root)
        self._root = root
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self.forget_handles()

    def listing(self, folder: str) -> dict[str, int]:
        """See Files."""
        found = {}
        try:
            with os.scandir(self._root / folder) as entries:
                for entry in entries:
                    try:
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
                    except FileNotFoundError:  # deleted since
                        continue
        except FileNotFoundError:
            return {}
        return dict(sorted(found.items()))

    def exists(self, name: str) -> bool:
        """See Files."""
        return (self._root / name).is_file()

    def read(self, name: str) -> bytes:
        """See Files."""
        return (self._root / name).read_bytes()

    def _handle(self, name: str) -> int:
        handle = self._handles.pop(name, None)
        if handle is None:
            handle = os.open(self._root / name, os.O_RDONLY)
            if len(self._handles) >= MAX_OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
        self._handles[name] = handle
        return handle

    def read_into(self, spans: Sequence[Span]) -> None:
        """See Files."""
        with self._lock:  # another thread must not close a handle between its lookup and its use
            for span in spans:
                handle, done, size = self._handle(span.name), 0, len(span.target)
                while done < size:
                    count = os.preadv(handle, [span.target.data[done:]], span.start + done)
                    if count == 0:
                        raise StoreError(f"{self._root / span.name} is cut short; restore the file or train again")
                    done += count

    def forget_handles(self) -> None:
        """See Files."""
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def _parent_of(self, name: str) -> Path:
        folder = (self._root / name).parent
        if not folder.is_dir():
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            for path in missing:
                sync_folder(path.parent)
        return folder

    def write(self, name: str, chunks: Iterable[Any]) -> int:
        """See Files."""
        folder, num_bytes = self._parent_of(name), 0
        try:
            with (self._root / name).open("xb") as file:
                for chunk in chunks:
                    num_bytes += file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            (self._root / name).unlink(missing_ok=True)
            raise
        sync_folder(folder)
        return num_bytes

    def create(self, name: str, data: bytes) -> bool:
        """See Files."""
        folder = self._parent_of(name)
        target = self._root / name
        temporary = folder / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, target)
            except FileExistsError:
                # NFS may repeat a link that was done and lost only its answer
                if not temporary.samefile(target):
                    return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise StoreError(
                    f"{folder}: the file system has no hard links, so two writers could both commit"
                ) from None
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(folder)
        return True

    def remove(self, names: Sequence[str]) -> None:
        """See Files."""
        for name in names:
            (self._root / name).unlink(missing_ok=True)
        for folder in {(self._root / name).parent for name in names}:
            sync_folder(folder)


class RemoteFiles(Files):
    """A prefix of an object store."""

    _within_process = threading.Lock()  # `memory://` looks and puts in two steps

    def __init__(self, file_system: Any, root: str, location: str) -> None:
        self.location = location
        self._fs = file_system
        self._root = root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def listing(self, folder: str) -> dict[str, int]:
        """See Files."""
        path = self._path(folder)
        self._fs.invalidate_cache(path)
        try:
            found = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        return dict(sorted((f["name"].rsplit("/", 1)[-1], f["size"]) for f in found if f["type"] == "file"))

    def exists(self, name: str) -> bool:
        """See Files."""
        self._fs.invalidate_cache(self._path(name))
        return bool(self._fs.exists(self._path(name)))

    def read(self, name: str) -> bytes:
        """See Files."""
        data: bytes = self._fs.cat_file(self._path(name))
        return data

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """See Files; object stores answer many requests at once."""
        paths = [self._path(name) for name in names]
        if not paths:
            return []
        found = self._fs.cat(paths, on_error="raise")
        by_path = found if isinstance(found, dict) else {paths[0]: found}  # a single path comes back bare
        return [by_path[path] for path in paths]

    def read_into(self, spans: Sequence[Span]) -> None:
        """See Files."""
        ends = [span.start + len(span.target) for span in spans]
        found = self._fs.cat_ranges(
            [self._path(span.name) for span in spans], [span.start for span in spans], ends, on_error="raise"
        )
        for span, data in zip(spans, found, strict=True):
            if len(data) != len(span.target):
                raise StoreError(f"{self._path(span.name)} is cut short; restore the file or train again")
            span.target[:] = np.frombuffer(data, np.uint8)

    def write(self, name: str, chunks: Iterable[Any]) -> int:
        """See Files."""
        num_bytes = 0
        try:
            with self._fs.open(self._path(name), "wb") as file:
                for chunk in chunks:
                    num_bytes += file.write(chunk)
        except BaseException:
            self.remove([name])
            raise
        return num_bytes

    def create(self, name: str, data: bytes) -> bool:
        """See Files."""
        path = self._path(name)
        with self._within_process:
            try:
                self._fs.pipe_file(path, data, mode="create")
            except OSError:
                # Backends name a lost race differently, and a put that was retried may meet its own first try: what
                # lies there tells. Where nothing does, it was another failure.
                self._fs.invalidate_cache(path)
                if not self._fs.exists(path):
                    raise
                return bool(self._fs.cat_file(path) == data)
        return True

    def remove(self, names: Sequence[str]) -> None:
        """See Files; object stores delete many in one request."""
        paths = [self._path(name) for name in names]
        try:
            self._fs.rm(paths)
        except FileNotFoundError:  # some were gone: the others one by one
            for path in paths:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(path)


def open_files(location: str | Path) -> Files:
    """The file layer for a local path or an fsspec URI.

    Raises:
        StoreError: for a protocol that fsspec does not know, whose package is missing, or that cannot commit.
    """
    if isinstance(location, Path) or "://" not in location:
        return LocalFiles(Path(location))
    from fsspec.core import url_to_fs

    protocol = location.partition("://")[0]
    if protocol not in ("file", "local", *EXCLUSIVE_CREATE):
        raise StoreError(
            f"store {location}: two writers could both commit to {protocol}://; use a local or shared folder, or one of"
            f" {', '.join(f'{name}://' for name in EXCLUSIVE_CREATE)}"
        )
    try:
        file_system, root = url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise StoreError(f"store {location}: {error}") from None
    protocols = {file_system.protocol} if isinstance(file_system.protocol, str) else set(file_system.protocol)
    if "file" in protocols:
        return LocalFiles(Path(root))
    return RemoteFiles(file_system, root, location)
