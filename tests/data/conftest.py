"""Prepared data that several tests of this folder tokenise."""

from __future__ import annotations

import pytest

from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from tests.fakes import write_json


@pytest.fixture
def prepared(tmp_path):
    def question(n, split):
        profile = [{"id": f"h{n}{k}", "text": f"film {n} {k}", "score": str(1 + k % 5)} for k in range(n)]
        return {"id": f"{split}{n}", "user_id": f"u{n}", "input": f"scale 1 to 5? review: new {n}", "profile": profile}

    for split, users in (("train", (1, 2, 3)), ("dev", (4, 0))):
        write_json(tmp_path / "in" / f"{split}_questions.json", [question(n, split) for n in users])
        golds = [{"id": f"{split}{n}", "output": "3"} for n in users]
        write_json(tmp_path / "in" / f"{split}_outputs.json", {"task": "LaMP_3", "golds": golds})
    prepare(DataConfig(path=str(tmp_path / "in")), tmp_path / "prepared")
    return PreparedData(tmp_path / "prepared")
