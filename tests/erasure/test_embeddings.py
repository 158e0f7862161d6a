"""A forgotten user's embeddings go; everybody else's stay to the bit, and in their places."""

from __future__ import annotations

import torch

from proper_ds.erasure.people import traces_of
from proper_ds.erasure.rows import erase_embeddings
from proper_ds.erasure.scan import scan
from proper_ds.run_folder import RunFolder
from proper_ds.training.embeddings import EmbeddingData, UserEmbeddings, write_embeddings

COUNTS = [[(2, 1), (0, 2), (0, 0)], [(3, 0), (1, 1)]]
"""By unit and user: items, questions."""


def test_embeddings_of_forgotten_users_go(tmp_path):
    run, generator, users, first = RunFolder(tmp_path), torch.Generator().manual_seed(1), [], 0
    place = run.stage("embeddings")
    for unit in COUNTS:
        made = [
            UserEmbeddings(*(torch.randn(n, 20, generator=generator) for n in (items, items, questions)))
            for items, questions in unit
        ]
        write_embeddings(place.path, first, made)
        users += made
        first += len(made)
    place.commit("a", {}, 0.0)
    traces = traces_of(run, {"ann": 0, "bob": 1, "cleo": 2, "dora": 77}, ["ann", "bob", "cleo", "dora"])
    assert len(traces.by_kind["embeddings"]) == 2 + 2 + 1 + 2
    assert scan(tmp_path, [], traces.by_kind).found
    assert erase_embeddings(place.path, [0, 1, 2, 77]).num_rows == 2
    assert not scan(tmp_path, [], traces.by_kind).found
    data = EmbeddingData(place.path)
    for number, before in enumerate(users):
        for name in ("keys_IE", "values_IE", "queries_QE"):
            wanted = getattr(before, name) if number > 2 else torch.zeros(0, 20)
            assert torch.equal(getattr(data.user(number), name), wanted)
    assert erase_embeddings(place.path, [0, 1]).num_rows == 0
