"""Small study files whose runs need neither a model hub nor data that is really read."""

from __future__ import annotations

import yaml

RUN = {
    "base": {"create": {"max_steps": 5}, "max_length": 120},
    "group": {"num_experts": 3, "lora": {"r": 4, "lora_alpha": 8}},
    "evaluation": {"methods": ["base", "population", "group"]},
}
LINE = '{"user": "ann", "history": [{"input": "a", "output": "b"}], "query": "q", "answer": "c"}\n'


def write_study(tmp_path, **changes):
    """A study file over one JSONL task below `tmp_path`."""
    for task in ("films", "books"):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "dev"):
            (folder / f"{split}.jsonl").write_text(LINE)
    study = {"output_dir": str(tmp_path / "study"), "data_root": str(tmp_path / "data"), "run": RUN}
    study |= {"tasks": {"films": None}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return path
