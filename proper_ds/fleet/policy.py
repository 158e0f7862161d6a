"""What to do when a unit fails: a decision as a value, without side effects. The controller acts on it.

A user whose data or loss is bad never gets here: the kernel gives up that user alone and says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from proper_ds.errors import UserError


class Decision(Enum):
    """Try the unit again on another worker, or end the run."""

    RETRY = "retry"
    STOP = "stop"


@dataclass(frozen=True)
class Failure:
    """A unit that did not finish.

    Attributes:
        error: what was raised there; None where the worker died (killed, out of memory, node lost).
        num_attempts: how often the unit has been tried, this time included.
    """

    unit: str
    error: BaseException | None
    num_attempts: int


@dataclass(frozen=True)
class FailurePolicy:
    """Retries what may be bad luck, `max_retries` times a unit; stops at once for what a retry cannot mend."""

    max_retries: int

    def decide(self, failure: Failure) -> Decision:
        """The decision for one failure."""
        if isinstance(failure.error, UserError) or failure.num_attempts > self.max_retries:
            return Decision.STOP
        return Decision.RETRY
