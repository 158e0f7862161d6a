"""Real actors under the controller: one that is killed by its unit, one that stands still, none that can start."""

from __future__ import annotations

import pytest

from proper_ds.config import RunConfig
from proper_ds.errors import ConfigError, FleetError
from proper_ds.fleet.cluster import Cluster, Node, ray_cluster
from proper_ds.fleet.config import FleetConfig
from proper_ds.fleet.controller import Controller
from proper_ds.fleet.plan import Unit
from proper_ds.fleet.policy import FailurePolicy
from proper_ds.fleet.pool import ray_pool
from tests.fleet.jobs import FREEZES_ONCE, KILLS

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
