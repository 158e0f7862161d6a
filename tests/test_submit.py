"""`cluster/submit.sh`: what it would send; the cluster itself is tried by hand (README)."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess

import pytest

from tests.conftest import REPO


def submit(*args, **env):
    return subprocess.run(
        ["bash", str(REPO / "cluster/submit.sh"), *args],
        env=os.environ | {"DRY_RUN": "1"} | env,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_sends_little_and_the_same_command():
    done = submit("cluster/runs/quickstart_cpu.yaml", "seed=7", RAY_API_SERVER_ADDRESS="http://head:1")
    assert done.returncode == 0, done.stderr
    size_kb = int(re.search(r"about (\d+) kB", done.stdout).group(1))
    assert size_kb < 2000
    command = shlex.split(done.stdout.split("command:")[1])
    assert command[:5] == ["ray", "job", "submit", "--address", "http://head:1"]
    assert command[-5:] == ["-m", "proper_ds", "run", "cluster/runs/quickstart_cpu.yaml", "seed=7"]
    sent = submit("compare", "cluster/studies/groups_cpu.yaml").stdout
    assert shlex.split(sent.split("command:")[1])[-2:] == ["compare", "cluster/studies/groups_cpu.yaml"]
    about = json.loads(command[command.index("--runtime-env-json") + 1])
    assert {"/.git", "/.venv", "/runs"} <= set(about["excludes"]), "anchored: cluster/runs must go along"
    assert about["env_vars"]["PROPER_DS_ROOT"] == str(REPO)


def test_it_refuses_what_it_cannot_send(tmp_path):
    missing = submit("no.yaml")
    assert missing.returncode == 2
    assert "no.yaml is no file" in missing.stderr
    outside = tmp_path / "run.yaml"
    outside.write_text("output_dir: x\n")
    refused = submit(str(outside))
    assert refused.returncode == 2
    assert "must lie inside" in refused.stderr
    assert submit().returncode == 2
    assert submit("sweep").returncode == 2


def test_whatever_the_readme_and_make_name_is_part_of_the_project():
    if not (REPO / ".git").exists():
        pytest.skip("no git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    text = (REPO / "README.md").read_text() + (REPO / "Makefile").read_text() + (REPO / ".ci/run").read_text()
    named = set(re.findall(r"\b(?:cluster|ds_configs|docs|tests)/[\w./-]*\.\w+", text))
    assert len(named) >= 6
    assert named <= set(tracked)
