"""Lines that speak of a user go, all others stay to the byte, whatever stands in them."""

from __future__ import annotations

import json
import logging

from hypothesis import given
from hypothesis import strategies as st

from proper_ds.erasure.rows import erase_lines
from proper_ds.observe.log import get_logger, log_to_file

ODD = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=8).map(
    lambda text: text.replace("ann", "") + "\u2028\u0085\r\x0c"
)


@given(texts=st.lists(st.tuples(ODD, st.booleans())), ends=st.booleans())
def test_only_lines_with_the_user_go(tmp_path_factory, texts, ends):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [json.dumps({"text": text + "ann" * theirs}, ensure_ascii=False) for text, theirs in texts]
    data = ("\n".join(lines) + "\n" * ends).encode()
    path.write_bytes(data)
    taken = erase_lines(path, lambda line: "ann" in line)
    kept = [line for line, (_, theirs) in zip(lines, texts, strict=True) if not theirs]
    assert taken.num_rows == len(lines) - len(kept)
    assert [json.loads(line) for line in path.read_bytes().decode().split("\n") if line] == [*map(json.loads, kept)]
    if not taken.num_rows:
        assert path.read_bytes() == data


def test_what_is_logged_to_a_file_goes_nowhere_else(tmp_path, monkeypatch):
    """Ray keeps what a worker's root logger says where forgetting does not reach."""
    logger, told = get_logger(), []
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        logger.warning("before")
        log_to_file(tmp_path, "user actor 0")
        logger.warning("user 'ann' has no adapter")
    finally:
        logging.getLogger().removeHandler(handler)
        for each in logger.handlers:
            each.close()
    assert told == ["before"]
    assert "user 'ann'" in (tmp_path / "user-actor-0.log").read_text()
