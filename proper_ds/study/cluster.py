"""One Ray cluster for all runs of a study or sweep, joined or started when the first of them needs it."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

from proper_ds.fleet.cluster import Cluster, ray_cluster


class SharedCluster:
    """Ends with the stack it is given."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._cluster: Cluster | None = None

    def get(self) -> Cluster:
        """The cluster."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(ray_cluster())
        return self._cluster

    def join(self) -> AbstractContextManager[Cluster]:
        """What `pipeline.run.Run` takes: the end of one run leaves the cluster up."""
        return nullcontext(self.get())
