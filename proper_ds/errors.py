"""The errors of proper_ds and their exit codes; raised everywhere, turned into text by the command line.

A message for a person says what was given, what is legal and what to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ProperError(Exception):
    """Any failure that proper_ds itself reports; `exit_code` is the process's."""

    exit_code = 1


class UserError(ProperError):
    """Something the user must mend before trying again; a retry with the same input cannot help."""

    exit_code = 2


class DataError(UserError):
    """Input data that cannot be used as it is."""


class AdapterError(UserError):
    """An adapter that does not fit its base, or is empty, non-finite or without effect."""


class StoreError(UserError):
    """An adapter store that lacks or contradicts what was asked of it."""


class BusyError(ProperError):
    """Files that others changed at the same moment, time and again; trying again later helps, and the fleet does."""


class FetchError(ProperError):
    """A download that kept breaking off; running the same command again goes on where it stopped."""


class FleetError(ProperError):
    """Actors or ranks that failed more often than allowed; running the same command again resumes."""


class StudyError(ProperError):
    """Runs of a study, or trials of a sweep, that failed; the others are kept, and the same command goes on."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: its dotted key, what is wrong, and how to mend it."""

    key: str
    wrong: str
    mend: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.key}: {self.wrong}. {self.mend}"


class ConfigError(UserError):
    """All problems of a configuration at once."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = list(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{source}: {count}\n{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, list[Problem]]]:
        """Survive the trip from an actor to the driver."""
        return type(self), (self.source, self.problems)
