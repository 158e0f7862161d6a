"""What every test gets: no network, quiet libraries, one thread, and the shared data where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one may take a second for an example
hypothesis.settings.load_profile("any machine")

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"


@pytest.fixture
def shared_data() -> Path:
    """Real data sets beside the project; a test that wants them is skipped where they are missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared data sets are not on this machine")
    return SHARED / "data"


@pytest.fixture
def lamp_folder(tmp_path):
    """Writes LaMP files: `lamp_folder(questions, golds, split="train", task="LaMP_2")` -> the folder."""
    from tests.fakes import write_json

    def write(questions, golds, split="train", task="LaMP_2", folder="lamp", ending=".json"):
        path = tmp_path / folder
        write_json(path / f"{split}_questions{ending}", questions)
        if golds is not None:
            write_json(path / f"{split}_outputs{ending}", {"task": task, "golds": golds})
        return path

    return write
