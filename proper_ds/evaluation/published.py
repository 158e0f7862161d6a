"""Figures that others published for LaMP's tasks: printed beside ours for orientation, never mixed with them.

Each says where it was read; none could be checked against code that runs, and none is of our protocol and base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from proper_ds.data.manifest import Manifest
from proper_ds.data.tasks import TASKS

OPPU_100, TIME_BASED, USER_BASED = "OPPU-100", "time-based", "user-based"
"""The 100 most active users, their later items asked; the same users, later items; other users than in training."""

_PERFIT = "PerFit's project page, personalizedllm.github.io/papers/perfit"
_PPLUG = "PPlug, arXiv 2409.11901, by third-party notes"
_AGENT = "PersonaAgent, by later papers"
_PILOT = "M-Pilot, by later papers"
_PHONE = "Geyko, Mosbach and Brinkmann 2026, a replication of OPPU, by search excerpts"
_LLAMA, _T5 = "Llama-2-7B", "FlanT5-XXL"


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        task: as in `data/tasks.py`.
        protocol: whose questions were asked, or "not known".
        source: where it was read.
    """

    task: str
    metric: str
    method: str
    value: float
    protocol: str
    base: str
    source: str


def _rows(
    task: str, metrics: Sequence[str], methods: dict[str, Sequence[float]], protocol: str, base: str, source: str
) -> list[Published]:
    return [
        Published(task, metric, method, value, protocol, base, source)
        for method, values in methods.items()
        for metric, value in zip(metrics, values, strict=True)
    ]


_CLASS, _RATING, _ROUGE = ("accuracy", "f1_macro"), ("mae", "rmse"), ("rouge-1", "rouge-L")

PUBLISHED = [
    *_rows("LaMP_2N", _CLASS, {"OPPU": (0.810, 0.589), "PerFit": (0.818, 0.586)}, OPPU_100, _LLAMA, _PERFIT),
    *_rows("LaMP_2M", _CLASS, {"OPPU": (0.600, 0.493), "PerFit": (0.630, 0.518)}, OPPU_100, _LLAMA, _PERFIT),
    *_rows("LaMP_3", _RATING, {"OPPU": (0.179, 0.443)}, OPPU_100, _LLAMA, _PERFIT),
    *_rows("LaMP_4", _ROUGE, {"OPPU": (0.191, 0.171), "PerFit": (0.207, 0.186)}, OPPU_100, _LLAMA, _PERFIT),
    *_rows("LaMP_5", _ROUGE, {"OPPU": (0.519, 0.442), "PerFit": (0.521, 0.451)}, OPPU_100, _LLAMA, _PERFIT),
    *_rows("LaMP_7", _ROUGE, {"OPPU": (0.539, 0.483), "PerFit": (0.525, 0.472)}, OPPU_100, _LLAMA, _PERFIT),
    *_rows("LaMP_1", _CLASS[:1], {"best baseline": (0.682,), "PPlug": (0.680,)}, TIME_BASED, _T5, _PPLUG),
    *_rows("LaMP_2M", _CLASS, {"best baseline": (0.416, 0.337), "PPlug": (0.565, 0.501)}, TIME_BASED, _T5, _PPLUG),
    *_rows("LaMP_3", _RATING[:1], {"best baseline": (0.246,), "PPlug": (0.231,)}, TIME_BASED, _T5, _PPLUG),
    *_rows("LaMP_4", _ROUGE[:1], {"best baseline": (0.207,), "PPlug": (0.216,)}, TIME_BASED, _T5, _PPLUG),
    *_rows("LaMP_5", _ROUGE[:1], {"best baseline": (0.480,), "PPlug": (0.487,)}, TIME_BASED, _T5, _PPLUG),
    *_rows("LaMP_7", _ROUGE[:1], {"best baseline": (0.468,), "PPlug": (0.536,)}, TIME_BASED, _T5, _PPLUG),
    *_rows("LaMP_2M", _CLASS[:1], {"RAG": (0.4933,), "OPPU": (0.5845,)}, OPPU_100, "SmolLM3-3B", _PHONE),
    *_rows("LaMP_1", _CLASS, {"PersonaAgent": (0.919, 0.918)}, "not known", "Claude-3.5", _AGENT),
    *_rows("LaMP_2M", _CLASS, {"PersonaAgent": (0.513, 0.424)}, "not known", "Claude-3.5", _AGENT),
    *_rows("LaMP_2N", _CLASS, {"PersonaAgent": (0.796, 0.532)}, "not known", "Claude-3.5", _AGENT),
    *_rows("LaMP_3", _RATING, {"PersonaAgent": (0.241, 0.509)}, "not known", "Claude-3.5", _AGENT),
    *_rows("LaMP_1", _CLASS[:1], {"prompt": (0.514,), "RAG k=4": (0.632,)}, "not known", "GPT-4o-mini", _PILOT),
    *_rows("LaMP_2N", _CLASS[:1], {"prompt": (0.655,), "RAG k=4": (0.792,)}, "not known", "GPT-4o-mini", _PILOT),
    *_rows("LaMP_2M", _CLASS[:1], {"prompt": (0.413,), "RAG k=4": (0.502,)}, "not known", "GPT-4o-mini", _PILOT),
    *_rows("LaMP_3", _RATING[:1], {"prompt": (0.371,), "RAG k=4": (0.272,)}, "not known", "GPT-4o-mini", _PILOT),
]


def is_published(name: str, manifest: Manifest) -> bool:
    """Whether a task's data may be taken for a benchmark's own: in the form of its files, under its name, with its
    labels, and not generated."""
    known, task = TASKS.get(name), manifest.tasks[name]
    if known is None or known.lamp_id == "generic" or name in manifest.from_rows:
        return False
    return not task.generated and task.labels == known.labels


def published_for(task: str, manifest: Manifest, protocol: str, base: str) -> list[dict[str, Any]]:
    """The published figures of a task, each with `differs`: what makes it another experiment than ours.

    Nothing for data that is not LaMP's own.

    Args:
        task: the task's name in the report.
        protocol: of this run's data, as far as known.
    """
    if not is_published(task, manifest):
        return []
    return [
        asdict(row) | {"differs": _differences(row, protocol, base)}
        for row in PUBLISHED
        if row.task == task and row.metric in manifest.tasks[task].metrics
    ]


def _differences(row: Published, protocol: str, base: str) -> list[str]:
    found = []
    if row.protocol != protocol:
        found.append(f"protocol {row.protocol}, ours {protocol}")
    if row.base.lower() not in base.lower():
        found.append(f"base {row.base}, ours {base}")
    return [*found, "other code, data of another preparation"]
