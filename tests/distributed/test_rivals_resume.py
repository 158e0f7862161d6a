"""The stages of PPlug and PLoRA as they are, cut short and gone on with by other ranks; only the fleet is left out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from proper_ds.config import load_config
from proper_ds.distributed.ranks import current_ranks
from proper_ds.fleet.plan import Unit
from proper_ds.model.persona import Persona
from proper_ds.model.plora import TABLE, PersonalLoras
from proper_ds.run_folder import RunFolder
from proper_ds.training.context import RunContext
from proper_ds.training.embeddings_job import EmbeddingsJob
from tests.distributed.gang import run_ranks
from tests.distributed.test_resume import ZERO, losses, train
from tests.end_to_end.runs import CONFIG, REPO, proper_ds

NUM_USERS, NUM_STEPS, CUT_AT = 16, 8, 5
RESULTS = {
    "pplug/base": "persona.safetensors",
    "pplug/population": "persona.safetensors",
    "plora": "level.safetensors",
}
TOLERANCE = 1e-5


def write_run(folder: Path, data: Path) -> Path:
    stage = {
        "max_steps": NUM_STEPS,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "train_batch_size": 11,
        "learning_rate": 3e-3,
    }
    config = {
        "output_dir": str(folder),
        "data": {"path": [str(data / "generated_tags"), str(data / "generated_ratings")]},
        "base": CONFIG["base"] | {"create": CONFIG["base"]["create"] | {"max_steps": 20}},
        "population": stage,
        "pplug": stage,
        "plora": stage | {"lora": {"lora_dropout": 0.2}, "mutual_information_weight": 0.3},
        "distributed": {"num_ranks": 2, "deepspeed": str(REPO / "ds_configs/zero2.json")},
        "evaluation": {"methods": ["PPlug", "PPlug+population", "PLoRA"]},
    }
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def whole_and_cut(path: str) -> None:
    """Everything undisturbed in one folder; its twin, each stage of which ends in the middle, in another."""
    ranks, folder = current_ranks(1), Path(path).with_suffix("")
    train(path, ("population",), NUM_STEPS)
    if ranks.is_first:
        RunFolder(folder).stage("embeddings").begin("inputs")
        EmbeddingsJob(load_config(path), torch.device("cpu")).run(Unit(0, NUM_USERS, 1, "embeddings", NUM_USERS))
        shutil.copytree(folder, folder.with_name("cut"))
        write_run(folder.with_name("cut"), folder.parent / "data")
        (folder.with_name("cut") / "metrics.jsonl").unlink()
    ranks.barrier()
    train(path, tuple(RESULTS), NUM_STEPS)
    train(str(folder.with_name("cut.yaml")), tuple(RESULTS), CUT_AT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Beside each other: `whole`, a run that nothing disturbed, and `cut`, its twin whose stages were cut short."""
    root = tmp_path_factory.mktemp("resume")
    proper_ds("data", "generate", "--users", str(NUM_USERS), "--groups", "2", "--seed", "5", "--out", root / "data")
    path = write_run(root / "whole", root / "data")
    proper_ds("run", path, "--steps", "prepare,base,tokens")
    run_ranks(whole_and_cut, 2, str(path))
    return root


def test_a_stage_cut_short_goes_on_with_one_rank_under_zero_3(folders):
    folder, whole = folders / "cut", folders / "whole"
    overrides = (f"{ZERO}zero3.json", "distributed.num_ranks=1")
    run_ranks(train, 1, str(folders / "cut.yaml"), tuple(RESULTS), NUM_STEPS, *overrides)
    for stage, result in RESULTS.items():
        found, wanted = losses(folder, stage), losses(whole, stage)
        assert sorted(found) == list(range(1, NUM_STEPS + 1))
        assert found == pytest.approx(wanted, abs=TOLERANCE), stage
        values, expected = load_file(folder / stage / result), load_file(whole / stage / result)
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(values[key], value, rtol=0, atol=TOLERANCE, msg=f"{stage} {key}")


def test_results_are_read_back_and_belong_to_users_with_history(folders):
    whole = folders / "whole"
    context = RunContext(load_config(folders / "whole.yaml"), torch.device("cpu"))
    for base in ("base", "population"):
        persona = Persona.load(whole / "pplug" / base / "persona.safetensors")
        assert persona.key_mean.abs().sum() > 0, "means of the training users' items are kept with the weights"
        assert not torch.equal(persona.question, torch.eye(len(persona.question))), "it trains"
    shared, table_LU = PersonalLoras.load(whole / "plora" / "level.safetensors")
    assert TABLE not in shared.state_dict()
    assert len(table_LU) == 1 + context.tokens.num_users
    assert not table_LU[0].any(), "the generic user's vector is zero"
    seen = int(table_LU.any(1).sum())
    assert 0 < seen <= context.tokens.num_users
