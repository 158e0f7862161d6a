"""Real actors under the controller: one that is killed by its unit, one that stands still, none that can start."""

from __future__ import annotations

import re

import pytest

from proper_ds.config import RunConfig
from proper_ds.errors import ConfigError, FleetError
from proper_ds.fleet.cluster import Cluster, Node, ray_cluster
from proper_ds.fleet.config import FleetConfig
from proper_ds.fleet.controller import Controller
from proper_ds.fleet.plan import Unit
from proper_ds.fleet.policy import FailurePolicy
from proper_ds.fleet.pool import _Slot, ray_pool
from tests.fleet.jobs import FREEZES_ONCE, KILLS

LOG = "logs/test-actor-0.log"
UNITS = [Unit(n, n + 1, 10, num_users=1) for n in range(10)]


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_cluster() as found:
            yield found


def work(cluster, folder, job, units, max_quarantined=0, **fleet):
    config = RunConfig(output_dir=str(folder), fleet=FleetConfig(**fleet))
    done, given_up = [], {}
    policy = FailurePolicy(config.fleet.max_retries, max_quarantined)
    with ray_pool(job, config, {}, "test", cluster) as pool:
        Controller(
            units,
            pool,
            policy,
            lambda unit, report: done.append(unit.first),
            lambda unit, reason: given_up.update({unit.first: reason}),
        ).run()
    return done, given_up


def test_a_deadly_unit_is_given_up_and_a_worker_that_stands_still_is_replaced(cluster, tmp_path):
    done, given_up = work(
        cluster, tmp_path, "tests.fleet.jobs:Recorder", UNITS, 1, num_actors=2, max_retries=2, ping_timeout_s=5
    )
    assert sorted([*done, KILLS]) == list(range(10))
    assert FREEZES_ONCE in done
    assert set(given_up) == {KILLS}
    assert "failed 3 times" in given_up[KILLS]
    assert (tmp_path / re.search(r"see (logs/\S+)$", given_up[KILLS])[1]).exists()


def test_an_actor_whose_process_is_spoilt_is_replaced_and_only_what_failed_is_blamed(cluster, tmp_path):
    done, given_up = work(cluster, tmp_path, "tests.fleet.jobs:SpoiltByItsFirst", UNITS, 1, num_actors=1, max_retries=0)
    assert sorted(done) == list(range(1, 10))
    assert given_up == {0: f"{UNITS[0].name} failed 1 times, the last time because of RuntimeError; see {LOG}"}
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [LOG.removeprefix("logs/")], "not one for the slot"


def test_actors_that_end_again_and_again_are_started_ever_later():
    slot, due_s = _Slot(), []
    for _ in range(2000):
        slot.end(100.0, most_s=60.0)
        due_s.append(slot.due_s - 100.0)
    assert due_s[:6] == [2.5, 5, 10, 20, 40, 60]
    assert due_s[-1] == 60


def test_a_job_that_cannot_be_built_stops_the_run_with_its_reason(cluster, tmp_path):
    with pytest.raises(FleetError, match=r"failed 2 times.*RuntimeError: no such weights"):
        work(cluster, tmp_path, "tests.fleet.jobs:Unbuildable", UNITS, num_actors=1, max_retries=1)


def test_actors_that_cannot_start_stop_the_run_with_their_reason(cluster, tmp_path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(FleetError, match=r"none of 2 actors could start.*FileExistsError"):
        work(cluster, tmp_path, "tests.fleet.jobs:Recorder", UNITS, num_actors=1, max_retries=1)


def test_what_fits_on_the_nodes():
    nodes = {"a": Node(8, 2), "b": Node(3, 4), "c": Node(5, 0)}
    assert Cluster(nodes, True, False).num_fitting(1) == 2 + 3
    assert Cluster(nodes, True, False).num_fitting(2) == 2 + 1
    assert Cluster(nodes, False, False).num_fitting(3) == 2 + 1 + 1
    assert Cluster(nodes, False, False).num_actors(FleetConfig(num_actors=99)) == 99


def test_more_actors_than_fit_are_refused_only_where_the_cluster_cannot_grow():
    fleet = FleetConfig(num_actors=3)
    with pytest.raises(ConfigError, match=r"fleet.num_actors: 3, but .* Use at most 2"):
        Cluster({"a": Node(2, 0)}, False, is_ours=True).check_actors(fleet)
    Cluster({"a": Node(2, 0)}, False, is_ours=False).check_actors(fleet)
