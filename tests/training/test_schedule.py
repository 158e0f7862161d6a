"""Every schedule equals Hugging Face's `get_scheduler`, step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from proper_ds.config import validate
from proper_ds.errors import ConfigError
from proper_ds.training.config import OptimSettings
from proper_ds.training.schedule import learning_rate, num_warmup_steps

RATE = st.sampled_from([0.0, 0.1, 0.5])
KWARGS = {
    "linear": st.just({}),
    "cosine": st.fixed_dictionaries({}, optional={"num_cycles": st.sampled_from([0.5, 1.0, 1.3])}),
    "cosine_with_restarts": st.fixed_dictionaries({}, optional={"num_cycles": st.integers(1, 4)}),
    "cosine_with_min_lr": st.one_of(
        st.fixed_dictionaries({"min_lr_rate": RATE}),
        st.fixed_dictionaries({"min_lr": st.sampled_from([0.0, 1e-5])}, optional={"num_cycles": st.just(1.5)}),
    ),
    "polynomial": st.fixed_dictionaries(
        {}, optional={"lr_end": st.sampled_from([0.0, 1e-6, 2e-5]), "power": st.sampled_from([0.5, 1.0, 2.0])}
    ),
    "constant": st.just({}),
    "constant_with_warmup": st.just({}),
    "inverse_sqrt": st.fixed_dictionaries({}, optional={"timescale": st.integers(30, 90)}),
    "warmup_stable_decay": st.fixed_dictionaries(
        {"num_decay_steps": st.integers(1, 20)},
        optional={
            "num_stable_steps": st.integers(0, 20),
            "warmup_type": st.sampled_from(["linear", "cosine", "1-sqrt"]),
            "decay_type": st.sampled_from(["linear", "cosine", "1-sqrt"]),
            "min_lr_ratio": RATE,
            "num_cycles": st.just(1.5),
        },
    ),
}
EVERY = st.sampled_from(sorted(KWARGS)).flatmap(lambda kind: st.tuples(st.just(kind), KWARGS[kind]))


@settings(max_examples=150, deadline=None)
@given(EVERY, st.integers(1, 60), st.one_of(st.integers(0, 20), st.sampled_from([0.0, 0.03, 0.3])))
def test_rates_equal_hugging_face(schedule, num_steps, warmup):
    kind, kwargs = schedule
    how = {"warmup_steps": warmup} if isinstance(warmup, int) else {"warmup_ratio": warmup}
    ours = OptimSettings(lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, learning_rate=1e-3, **how)
    num_warmup = num_warmup_steps(num_steps, ours)
    if kind == "polynomial" and num_warmup >= num_steps:
        return  # Hugging Face divides by zero, or goes on with a negative number of steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(kind, optimizer, num_warmup, num_steps, kwargs)
    for step in range(num_steps):
        assert learning_rate(ours, step, num_steps) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-18), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "linear"}, "has no effect with `linear`"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "below learning_rate"),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 1.5}}, "a whole number"),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 3, "decay_type": "exp"},
            },
            "Legal are linear",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "has no effect with lr_scheduler_type `constant`"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "together with warmup_steps"),
    ],
)
@pytest.mark.parametrize("section", ["population", "user"])
def test_settings_of_another_schedule_are_refused(tmp_path, section, changes, told):
    raw = {"output_dir": str(tmp_path), "base": {"model": "x"}, "data": {"path": str(tmp_path)}, section: changes}
    with pytest.raises(ConfigError, match=told):
        validate(raw, "test")
