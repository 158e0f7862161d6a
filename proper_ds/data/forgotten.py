"""Who is kept out of a run: keyed hashes of forgotten users, so that the list itself names nobody.

`proper-ds store forget` adds to it; preparing and reading data sets those users aside.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from proper_ds.errors import DataError
from proper_ds.files import write_json_atomic

FORGOTTEN = "forgotten.json"
_TOMBSTONE = "(forgotten user {:06d})"


def tombstone(index: int) -> str:
    """The key that stands in the place of a forgotten user, so that nobody else's index moves."""
    return _TOMBSTONE.format(index)


class Forgotten:
    """The list of one run."""

    def __init__(self, salt: str, hashes: set[str]) -> None:
        self._salt, self._hashes = salt, hashes

    @classmethod
    def read(cls, root: Path) -> Forgotten:
        """The list in a run's folder; an empty one where there is none. Raises DataError where it is damaged."""
        path = root / FORGOTTEN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(found["salt"], set(found["hashes"]))
        except FileNotFoundError:
            return cls(secrets.token_hex(32), set())
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); restore it: it keeps forgotten users out") from None

    def __len__(self) -> int:
        return len(self._hashes)

    def has(self, key: str) -> bool:
        """Whether the user of this key is to be kept out."""
        return bool(self._hashes) and self._hash(key) in self._hashes

    def add(self, keys: Sequence[str], root: Path) -> None:
        """Put users on the list, durably."""
        self._hashes |= self.hashes_of(keys)
        write_json_atomic(root / FORGOTTEN, {"salt": self._salt, "hashes": sorted(self._hashes)})

    def hashes_of(self, keys: Iterable[str]) -> set[str]:
        """What stands for these users on the list, whether they are on it or not."""
        return {self._hash(key) for key in keys}

    def _hash(self, key: str) -> str:
        salt = bytes.fromhex(self._salt)
        return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16, key=salt).hexdigest()
