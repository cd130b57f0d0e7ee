"""`hdit watch --serve`: what it answers, and what it does not."""

import gzip
import http.client
import json
import threading
from contextlib import contextmanager

import pytest

from hdit.errors import UserError
from hdit.report.watch.grids import PNG
from hdit.report.watch.server import Server


@pytest.fixture
def folder(tmp_path):
    """A run of one line of metrics and one grid, beside a secret."""
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "config.toml").write_text("[training]\nimages = 100\n")
    (run / "metrics.jsonl").write_text('{"images": 1, "loss": 2.0}\n')
    (run / "samples" / "000000000010.png").write_bytes(PNG + b"grid")
    (tmp_path / "secret.png").write_bytes(PNG + b"secret")
    return run


@contextmanager
def served(*folders):
    """get(path, **headers) -> (status, body, headers), of a server of these runs."""
    with Server(folders, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def get(path, **headers):
            port = server.server_address[1]
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            named = {key.replace("_", "-"): value for key, value in headers.items()}
            connection.request("GET", path, headers=named)
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            return answer.status, body, answer.headers

        try:
            yield get
        finally:
            server.shutdown()
            thread.join()


def test_server_gives_page_data_and_grids(folder):
    with served(folder) as get:
        status, body, headers = get("/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert body.startswith(b"<!doctype html>")
        status, body, _ = get("/data.json")
        told = json.loads(body)
        assert told["live"] > 0
        [run] = told["runs"]
        assert run["curves"]["loss"] == {"x": [1], "y": [2.0]}
        [grid] = run["grids"]
        status, body, headers = get(f"/{grid['src']}")
        assert (status, body, headers["Content-Type"]) == (200, PNG + b"grid", "image/png")


def test_server_tells_what_a_run_has_written_since(folder):
    with served(folder) as get:
        first = json.loads(get("/data.json")[1])
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"images": 2, "loss": 1.0}\n')
        (folder / "samples" / "000000000020.png").write_bytes(PNG)
        second = json.loads(get("/data.json")[1])
    assert first["runs"][0]["state"]["images"] == 1
    assert second["runs"][0]["curves"]["loss"]["y"] == [2.0, 1.0]
    assert [grid["images"] for grid in second["runs"][0]["grids"]] == [10, 20]


def test_server_sends_nothing_again_that_has_not_changed(folder):
    with served(folder) as get:
        _, body, headers = get("/data.json", Accept_Encoding="gzip")
        assert json.loads(gzip.decompress(body))["runs"]
        status, body, _ = get("/data.json", If_None_Match=headers["ETag"])
    assert (status, body) == (304, b"")


@pytest.mark.parametrize(
    "path",
    ["/grid/0/../../../secret.png", "/grid/0/..%2f..%2f..%2fsecret.png", "/config.toml",
     "/grid/0/11.png", "/grid/1/10.png", "/grid/-1/10.png", "//etc/passwd", "/grid/0/10.png/..",
     "/../secret.png"],
)  # fmt: skip
def test_server_gives_nothing_but_grids_of_its_runs(folder, path):
    with served(folder) as get:
        status, body, _ = get(path)
    assert status == 404
    assert b"secret" not in body


def test_server_follows_no_link_out_of_a_run(folder):
    (folder / "samples" / "000000000030.png").symlink_to(folder.parent / "secret.png")
    with served(folder) as get:
        assert get("/grid/0/30.png")[0] == 404


def test_server_answers_to_names_of_this_machine_alone(folder):
    """Else a page from elsewhere whose name leads here could read the runs."""
    with served(folder) as get:
        assert get("/data.json", Host="elsewhere.example:80")[0] == 403
        assert get("/data.json", Host="localhost:9999")[0] == 200


def test_port_that_is_taken_is_an_error_that_names_it(folder):
    with Server([folder], 0) as server:
        port = server.server_address[1]
        with pytest.raises(UserError, match=f"--port: {port} cannot be had: another program"):
            Server([folder], port)
