"""What to do when a unit fails: a decision as a value, without side effects. The controller acts on it.

A user whose data or loss is bad never gets here: the kernel gives up that user alone and says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from proper_ds.errors import UserError


class Decision(Enum):
    """Try the unit again on another worker, give up its users and go on, or end the run."""

    RETRY = "retry"
    QUARANTINE = "quarantine"
    STOP = "stop"


MOST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Failure:
    """A unit that did not finish.

    Attributes:
        error: what was raised there; None where the worker was lost (killed, out of memory, node lost).
        num_attempts: how often the unit has been tried, this time included.
        num_users: users of the unit.
        num_quarantined: users given up before.
    """

    unit: str
    error: BaseException | None
    num_attempts: int
    num_users: int = 0
    num_quarantined: int = 0


@dataclass(frozen=True)
class FailurePolicy:
    """Retries what may be bad luck, gives up the few units that fail again and again, stops where no unit is at fault.

    Attributes:
        max_retries: how often a unit is tried again.
        max_quarantined: users that may be given up in all; beyond it the cause is taken to lie elsewhere.
    """

    max_retries: int
    max_quarantined: int = 0

    def decide(self, failure: Failure) -> Decision:
        """The decision for one failure."""
        if isinstance(failure.error, UserError):
            return Decision.STOP
        if failure.num_attempts <= self.max_retries:
            return Decision.RETRY
        fits = 0 < self.max_quarantined >= failure.num_quarantined + failure.num_users
        return Decision.QUARANTINE if fits else Decision.STOP

    @staticmethod
    def pause_s(num_attempts: int) -> float:
        """Seconds until a unit that failed so often is tried again: 1, 2, 4 and so on, for what mends itself."""
        return min(MOST_PAUSE_S, 2.0 ** min(num_attempts - 1, 10))

    def about_limit(self, num_quarantined: int) -> str:
        """What a message of the stop adds."""
        if not self.max_quarantined:
            return ""
        return (
            f". With it more than {self.max_quarantined} users would have been given up (fleet.max_quarantined_share;"
            f" {num_quarantined} are already), so the cause is hardly theirs: see the actors' logs in the run's folder"
        )
