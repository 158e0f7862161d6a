"""Downloading from a server that breaks off, changes its files, lies about sizes or has another page instead."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from proper_ds.cli import app
from proper_ds.data.fetch import MAX_TRIES, RECORD, Fetcher, Missing
from proper_ds.data.lamp_files import FILES, OFFICIAL, fetch_lamp, mirror, remote_paths
from proper_ds.errors import DataError, FetchError

BODY = json.dumps([{"id": str(n), "text": "x" * 50} for n in range(4000)]).encode()


class Server:
    """Files by path, and how badly they are served.

    Attributes:
        cut: bytes of an answer's body after which the connection ends, by number of request; the last holds on.
        asked: (path, Range header) of each request.
    """

    def __init__(self):
        self.files = {"/a.json": BODY}
        self.cut: list[int | None] = [None]
        self.ranges, self.etag, self.too_long, self.statuses = True, '"v1"', 0, []
        self.says_length, self.shift, self.sums_statuses = True, 0, []
        self.asked = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request):
        body = self.files.get(request.path)
        asked = request.headers.get("Range")
        if request.path != "/SHA256SUMS":
            self.asked.append((request.path, asked))
        statuses = self.sums_statuses if request.path == "/SHA256SUMS" else self.statuses if body else []
        if statuses:
            return request.send_error(statuses.pop(0))
        if body is None:
            return request.send_error(404)
        start = 0
        if asked and self.ranges and request.headers.get("If-Range") == self.etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return request.send_error(416)
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start + self.shift}-{len(body) - 1}/{len(body)}")
        if self.says_length:
            request.send_header("Content-Length", str(len(body) - start + self.too_long))
        if self.etag:
            request.send_header("ETag", self.etag)
        request.end_headers()
        cut = self.cut.pop(0) if len(self.cut) > 1 else self.cut[0]
        request.wfile.write(body[start:] if cut is None else body[start : start + cut])
        request.close_connection = True
        return None


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def fetch(server, out, pauses=None):
    pauses = [] if pauses is None else pauses
    return Fetcher(server.url, out, 5.0, pauses.append).fetch("a.json", "a.json")


def left(out):
    return sorted(path.name for path in out.iterdir())


def test_a_connection_that_breaks_off_is_taken_up_where_it_ended(server, tmp_path):
    server.cut = [70_000, 40_000, None]
    assert fetch(server, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, "bytes=70000-", "bytes=110000-"]
    record = json.loads((tmp_path / RECORD).read_text())["files"]["a.json"]
    assert record["sha256"] == hashlib.sha256(BODY).hexdigest() and record["num_bytes"] == len(BODY)
    assert left(tmp_path) == ["a.json", RECORD]


def test_a_later_call_goes_on_and_a_third_asks_for_nothing(server, tmp_path):
    server.cut = [70_000, 0]
    pauses: list[float] = []
    with pytest.raises(FetchError, match=r"70,000 of .* run it again to go on"):
        fetch(server, tmp_path, pauses)
    assert pauses == [1, 2, 4, 8, 16, 30] and len(server.asked) == 1 + MAX_TRIES
    server.asked, server.cut = [], [None]
    assert fetch(server, tmp_path)
    assert [asked for _, asked in server.asked] == ["bytes=70000-"]
    assert not fetch(server, tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize("why", ["no ranges", "no version", "a new version"])
def test_what_cannot_be_continued_begins_anew(server, tmp_path, why):
    server.cut = [70_000, 0]
    server.etag = None if why == "no version" else '"v1"'
    with pytest.raises(FetchError):
        fetch(server, tmp_path)
    server.cut = [None]
    new = BODY if why != "a new version" else BODY.replace(b"x", b"y")
    server.ranges, server.files["/a.json"] = why != "no ranges", new
    server.etag = '"v2"' if why == "a new version" else server.etag
    assert fetch(server, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == new


def test_wrong_sizes_are_no_success(server, tmp_path):
    server.too_long = 10
    with pytest.raises(FetchError, match="bytes came"):
        fetch(server, tmp_path)
    assert not (tmp_path / "a.json").exists()


def test_without_a_length_the_end_of_the_json_tells_what_is_whole(server, tmp_path):
    server.says_length, server.etag = False, None
    server.cut = [70_000, BODY.index(b"}", 80_000) + 1, None]
    assert fetch(server, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == BODY and len(server.asked) == 3
    assert json.loads((tmp_path / RECORD).read_text())["files"]["a.json"]["checked_by"] == "end of the JSON"


def test_a_range_that_was_not_asked_for_is_not_written(server, tmp_path):
    server.cut, server.shift = [70_000, None], 10
    assert fetch(server, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, "bytes=70000-", None]


def test_another_file_is_not_taken_for_the_one_that_is_there(server, tmp_path):
    server.files["/time/a.json"] = BODY
    Fetcher(server.url, tmp_path, 5.0).fetch("time/a.json", "a.json")
    with pytest.raises(DataError, match=r"was fetched from .*/time/a.json, not as a.json; give another --out"):
        fetch(server, tmp_path)
    assert not Fetcher(server.url.replace("127.0.0.1", "localhost"), tmp_path, 5.0).fetch("time/a.json", "a.json")


def test_a_file_that_came_whole_before_the_process_ended_is_not_asked_for_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr("proper_ds.data.fetch._sha256", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch(server, tmp_path)
    monkeypatch.undo()
    assert fetch(server, tmp_path) and len(server.asked) == 1
    assert (tmp_path / "a.json").read_bytes() == BODY


def test_a_server_that_does_not_answer_is_told_with_a_way_out_and_leaves_nothing(server, tmp_path, caplog):
    server.close()
    pauses: list[float] = []
    out = tmp_path / "new" / "lamp"
    with pytest.raises(FetchError, match=r"6 times in a row.*--mirror ADDRESS, or PROPER_DS_LAMP_MIRROR"):
        fetch_lamp("3", "user", server.url, out, lambda url, path: Fetcher(url, path, 5.0, pauses.append))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(pauses) == MAX_TRIES - 1
    assert all(line.endswith(f"trying again in {pause:g} s") for line, pause in zip(told, pauses, strict=True))
    assert left(tmp_path) == []


def test_what_came_before_a_failure_stays_with_its_folder(server, tmp_path):
    server.cut = [70_000, 0]
    with pytest.raises(FetchError):
        fetch(server, tmp_path / "new")
    assert ".a.json.part" in left(tmp_path / "new")


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    server.statuses = [503, 429]
    pauses: list[float] = []
    assert fetch(server, tmp_path, pauses)
    assert pauses == [1, 2]
    with pytest.raises(Missing, match="404"):
        Fetcher(server.url, tmp_path, 5.0, pauses.append).fetch("b.json", "b.json")
    assert pauses == [1, 2]


def test_a_page_in_place_of_data_is_noticed(server, tmp_path):
    server.files["/a.json"] = b"<!doctype html><html>No such file</html>"
    with pytest.raises(DataError, match="brought a page, not JSON"):
        fetch(server, tmp_path)
    assert left(tmp_path) == []


def test_the_servers_checksums_hold(server, tmp_path):
    server.files["/SHA256SUMS"] = f"{'0' * 64}  a.json\n".encode()
    with pytest.raises(DataError, match=r"has SHA-256 .* says 0000"):
        fetch(server, tmp_path)
    assert left(tmp_path) == []
    server.files["/SHA256SUMS"] = f"{hashlib.sha256(BODY).hexdigest()} *./a.json\n".encode()
    assert fetch(server, tmp_path)
    assert json.loads((tmp_path / RECORD).read_text())["files"]["a.json"]["checked_by"] == "SHA256SUMS"


def test_a_list_of_checksums_that_cannot_be_read_is_not_taken_for_none(server, tmp_path):
    server.files["/SHA256SUMS"] = f"{hashlib.sha256(BODY).hexdigest()} a.json\n".encode()
    server.sums_statuses = [503] * MAX_TRIES
    with pytest.raises(FetchError, match=r"SHA256SUMS: .*503.* cannot be checked"):
        fetch(server, tmp_path)
    assert "a.json" not in left(tmp_path)
    server.sums_statuses = [503]
    assert fetch(server, tmp_path) and len(server.asked) == 1
    assert json.loads((tmp_path / RECORD).read_text())["files"]["a.json"]["checked_by"] == "SHA256SUMS"


def test_a_file_damaged_since_is_fetched_again_and_a_strangers_is_left_alone(server, tmp_path):
    fetch(server, tmp_path)
    (tmp_path / "a.json").write_bytes(BODY[:-1])
    assert fetch(server, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == BODY
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text("mine")
    with pytest.raises(DataError, match="was not fetched by this command"):
        fetch(server, tmp_path / "other")


def test_lamps_own_paths(monkeypatch):
    assert remote_paths("2", "time")["dev_questions.json"] == "time/LaMP_2/new/dev/dev_questions.json"
    assert remote_paths("2N", "user")["train_outputs.json"] == "LaMP_2/train/train_outputs.json"
    assert remote_paths("LaMP_5", "user")["test_questions.json"] == "LaMP_5/test/test_questions.json"
    with pytest.raises(DataError, match="LDC2015T03"):
        remote_paths("6", "user")
    with pytest.raises(DataError, match="'8' is no task of LaMP"):
        remote_paths("8", "user")
    monkeypatch.delenv("PROPER_DS_LAMP_MIRROR", raising=False)
    assert mirror(None) == OFFICIAL
    monkeypatch.setenv("PROPER_DS_LAMP_MIRROR", "https://mirror/")
    assert (mirror(None), mirror("http://given/")) == ("https://mirror/", "http://given/")
    with pytest.raises(DataError, match="no address"):
        Fetcher("mirror", None)


def test_the_command_uses_the_mirror_of_the_environment(server, tmp_path, monkeypatch):
    server.files |= {f"/time/LaMP_3/{name.partition('_')[0]}/{name}.json": BODY for name in FILES}
    monkeypatch.setenv("PROPER_DS_LAMP_MIRROR", server.url)
    asked = ["data", "fetch", "lamp", "--task", "3", "--split", "time", "--out", str(tmp_path / "out")]
    assert "5 files fetched" in CliRunner().invoke(app, asked).output
    assert "0 files fetched" in CliRunner().invoke(app, asked).output
    assert (tmp_path / "out" / "test_questions.json").read_bytes() == BODY


def test_a_whole_task(server, tmp_path, caplog):
    for name in FILES[:-1]:
        server.files[f"/LaMP_3/{name.partition('_')[0]}/{name}.json"] = BODY
    brought = fetch_lamp("3", "user", server.url, tmp_path / "out")
    assert brought == [f"{name}.json" for name in FILES[:-1]] and "no test questions" in caplog.text
    assert fetch_lamp("3", "user", server.url, tmp_path / "out") == []
    with pytest.raises(DataError, match="right address"):
        fetch_lamp("4", "user", server.url, tmp_path / "other")
