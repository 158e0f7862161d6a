"""What the driver's steps say of themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.console import Console

from proper_ds.config import RunConfig
from proper_ds.evaluation.answers import read_answers
from proper_ds.observe.progress import ProgressView
from proper_ds.pipeline.stage import Stage
from proper_ds.pipeline.steps import Steps
from proper_ds.run_folder import RunFolder
from tests.evaluation.crafted import ratings, table


def test_each_floor_is_charged_what_it_took(tmp_path, monkeypatch):
    """And not a share of what all took together: counting labels is cheap, fitting words is not."""
    took_s, clock = {"own-habit": 1.0, "words": 10.0, "words+own": 13.0}, [0.0]

    def predict(prepared, split, train_split, methods, seed, max_examples):
        clock[0] += sum(took_s[method] for method in methods)
        return table(ratings(dict.fromkeys(methods, 0.5), 3))

    monkeypatch.setattr("proper_ds.pipeline.steps.predict_floors", predict)
    monkeypatch.setattr("proper_ds.pipeline.steps.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    config = RunConfig(output_dir=str(tmp_path))
    context = SimpleNamespace(config=config, folder=RunFolder(tmp_path), prepared=None)
    steps = Steps(context, ProgressView(Console(quiet=True)), lambda: pytest.fail("floors need no Ray"), {})
    steps.do([Stage(f"predictions/{name}", "floors", "driver", {}, (), name, {}) for name in took_s])
    assert steps.unit_seconds == {f"predictions/{name}": seconds for name, seconds in took_s.items()}
    for name in took_s:
        assert set(read_answers(tmp_path / "predictions" / name).column("method").to_pylist()) == {name}
