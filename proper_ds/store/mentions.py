"""Where a text speaks of a user: forgetting blanks such texts, and the proof of it looks for them with the same eyes.

`maintenance.forget` and the package `erasure` use it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

LONG_KEY_BYTES = 6


def is_long(key: str) -> bool:
    """Whether a key is long enough not to be found by chance."""
    return len(key.encode("utf-8", "surrogatepass")) >= LONG_KEY_BYTES


def mention_pattern(keys: Collection[str]) -> re.Pattern[bytes]:
    """Matches where a text speaks of one of the users. Without users it matches nothing.

    Long keys count as whole words; a short one, which may be any number or label, only where it is said to be a user.
    """

    def any_of(chosen: list[str]) -> bytes:
        return b"|".join(re.escape(key.encode("utf-8", "surrogatepass")) for key in chosen)

    either = [] if keys else [b"(?!)"]
    if long := [key for key in keys if is_long(key)]:
        either.append(rb"(?<![0-9A-Za-z_])(?:" + any_of(long) + rb")(?![0-9A-Za-z_])")
    if short := [key for key in keys if not is_long(key)]:
        either.append(rb"user[\"']?:? ?[\"'](?:" + any_of(short) + rb")[\"']")
    return re.compile(b"|".join(either))
