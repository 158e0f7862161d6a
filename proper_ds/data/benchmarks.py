"""The published files of other benchmarks, by the name that `data.format` gives them. `sources.py` asks here.

Each has a module of its own that finds its files in a folder and reads them as questions with histories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper_ds.data import longlamp, oppu, peft_u, personal_llm
from proper_ds.data.benchmark_files import Found
from proper_ds.data.readers import Complain
from proper_ds.data.records import RawQuestion


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark's files are found and read.

    Attributes:
        files: what they are called, for messages.
        find: the benchmark's files among some, or None.
        read: one file's questions, given its split and the data set's info.
    """

    files: str
    find: Callable[[list[Path]], Found | None]
    read: Callable[[Path, str, dict[str, Any], Complain], Iterator[RawQuestion]]


BENCHMARKS = {
    "oppu": Benchmark("user_others.json and user_top_100_history.json of OPPU", oppu.find, oppu.read),
    "peft-u": Benchmark("user_data_no_leak.json or user_data_leaked.json of PEFT-U", peft_u.find, peft_u.read),
    "longlamp": Benchmark("LongLaMP rows (input, output, profile and an author)", longlamp.find, longlamp.read),
    "personal-llm": Benchmark("PersonalLLM rows (prompt_1, chosen_1, ..)", personal_llm.find, personal_llm.read),
}
