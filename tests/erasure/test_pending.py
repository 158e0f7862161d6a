"""While forgetting is unfinished or a run at work, commands leave adapters alone; nobody else is forgotten first."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from proper_ds.cli import app
from proper_ds.data.forgotten import Forgotten
from proper_ds.erasure.exports import read_exports
from proper_ds.erasure.forget import FOLDER, PENDING, _check_same_users
from proper_ds.errors import UserError
from proper_ds.run_folder import RunFolder
from proper_ds.store.store import AdapterStore
from tests.store.stores import put, rows


def cut_short(root, users):
    """What a forget that was killed leaves: the list of who is kept out, and for whom it was."""
    forgotten = Forgotten.read(root)
    forgotten.add(users, root)
    (root / FOLDER).mkdir(exist_ok=True)
    (root / FOLDER / PENDING).write_text(json.dumps({"users": sorted(forgotten.hashes_of(users)), "receipt": {}}))


def test_forgetting_that_was_cut_short_goes_on_for_the_same_users_only(tmp_path):
    cut_short(tmp_path, ["ann", "bob"])
    for others in (["cid"], ["ann"], ["bob", "cid"]):
        with pytest.raises(UserError, match="forgetting 2 users was cut short there"):
            _check_same_users(tmp_path, others, Forgotten.read(tmp_path))
    for same in (["ann", "bob"], ["cid", "bob", "ann"]):
        _check_same_users(tmp_path, same, Forgotten.read(tmp_path))
    assert "ann" not in (tmp_path / FOLDER / PENDING).read_text()


@pytest.mark.parametrize("command", ["get", "rollback", "compact"])
@pytest.mark.parametrize("is_locked", [False, True])
def test_commands_wait_for_forgetting_and_for_runs(tmp_path, command, is_locked):
    run, out = tmp_path / "run", tmp_path / "out"
    store = AdapterStore(run / "store/OPPU")
    for version in (1, 2):
        put(store, "unit-0", {"bob": rows(1, version)[0]}, version=version)
    (run / "config.yaml").write_text("")
    (run / "population/adapter").mkdir(parents=True)
    about = {"base_model_name_or_path": "some/base", "revision": None}
    (run / "population/adapter/adapter_config.json").write_text(json.dumps(about))
    arguments = ["store", command, *(["bob"] if command != "compact" else []), "--run", str(run)]
    arguments += ["--out", str(out)] if command == "get" else []
    before = {path: path.read_bytes() for path in (run / "store").rglob("*") if path.is_file()}
    if is_locked:
        with RunFolder(run).locked():
            error = CliRunner().invoke(app, arguments).exception
    else:
        cut_short(run, ["ann"])
        error = CliRunner().invoke(app, arguments).exception
        (run / FOLDER / PENDING).unlink()
    assert isinstance(error, UserError)
    assert ("another run is at work" if is_locked else "was cut short") in str(error)
    assert before == {path: path.read_bytes() for path in (run / "store").rglob("*") if path.is_file()}
    assert not out.exists()
    assert read_exports(run) == []
    assert CliRunner().invoke(app, arguments).exit_code == 0, "afterwards it is done"
