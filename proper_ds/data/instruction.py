"""Finds a data set's own instruction: the words that all its questions begin with.

History items are then trained on under the very wording in which questions are asked.
"""

from __future__ import annotations

from os.path import commonprefix  # of characters, which is what is wanted here

from proper_ds.data.tasks import Task


class SharedBeginning:
    """The longest common beginning of a stream of questions; constant memory."""

    def __init__(self) -> None:
        self._prefix: str | None = None
        self._num_distinct = 0

    def update(self, question: str) -> None:
        """Look at one more question."""
        if self._prefix is None:
            self._prefix, self._num_distinct = question, 1
            return
        shared = commonprefix([self._prefix, question])  # noqa: RUF071
        if len(shared) < len(question) or len(shared) < len(self._prefix):
            self._num_distinct += 1
        self._prefix = shared

    def shows(self, instruction: str) -> bool:
        """Whether all questions begin with it; True where there was none."""
        return self._prefix is None or self._prefix.startswith(instruction)

    def instruction(self, task: Task) -> str:
        """The instruction, with its closing space; the task's own wording where the questions do not show theirs.

        A generic question is its text and nothing else, unless info.json gives an instruction: what questions happen
        to share there may be text of the items as well. Elsewhere the task's marker is looked for first, since a
        single question shows no common beginning; then the last ": " that several different questions share.
        """
        if task.lamp_id == "generic":
            return task.instruction
        prefix = self._prefix or ""
        if task.marker and task.marker in prefix:
            return prefix[: prefix.index(task.marker) + len(task.marker)]
        if self._num_distinct > 1 and ": " in prefix:
            return prefix[: prefix.rindex(": ") + 2]
        return task.instruction
