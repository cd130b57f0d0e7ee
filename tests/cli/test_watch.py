"""hdit watch"""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two runs of the same name and one that has just begun, in which it runs."""
    for name in ("a/run", "b/run"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(f'[training]\nimages = 100\nname = "{name}"\n')
        lines = [json.dumps({"images": 10 * i, "loss": 1 / i}) for i in range(1, 5)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".lock").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(page):
    text = Path(page).read_text()
    start = text.index(">", text.index('id="data"')) + 1
    return json.loads(text[start : text.index("</script>", start)])


def test_watch_writes_a_page_of_several_runs_into_the_first(here, hdit):
    status, out, _ = hdit("watch", "a/run", "b/run", "new")
    assert (status, out) == (0, "a/run/watch.html\n")
    told = data("a/run/watch.html")
    assert [run["name"] for run in told["runs"]] == ["a/run", "b/run", "new"]
    assert told["runs"][0]["curves"]["loss"]["y"] == [1, 0.5, 0.333333, 0.25]
    assert told["differences"][-1]["values"] == ['"a/run"', '"b/run"', None]


def test_watch_writes_where_it_is_told(here, hdit):
    assert hdit("watch", "new", "--out", "pages/page.html")[0] == 0
    assert [run["name"] for run in data("pages/page.html")["runs"]] == ["new"]
    assert not (here / "new" / "watch.html").exists()


def test_watch_takes_names_that_are_not_utf8(here, hdit):
    name = os.fsdecode(b"run-\xff")
    (here / "new").rename(here / name)
    assert hdit("watch", name)[0] == 0
    assert [run["name"] for run in data(here / name / "watch.html")["runs"]] == [r"run-\xff"]


def test_watch_draws_a_real_run(trained, tmp_path, hdit):
    assert hdit("watch", str(trained), "--out", str(tmp_path / "w.html"))[0] == 0
    [run] = data(tmp_path / "w.html")["runs"]
    assert run["state"]["is"] == "finished"
    assert run["state"]["weights"] > 1000
    assert run["curves"]["loss"]["x"] == [16, 32, 48, 64, 80, 96]
    assert [grid["images"] for grid in run["grids"]] == [32, 64, 96]
    assert run["config"].startswith("[")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none"], "none: there is no such folder"),
        (["a"], "a: is no run"),
        (["a/run", "a/../a/run"], "is named twice"),
        (["a/run", "--port", "80"], "--port: has no effect without --serve"),
        (["a/run", "--serve", "--out", "x"], "--out: has no effect with --serve"),
        (["a/run", "--out", "b"], "--out: b is a folder"),
    ],
)
def test_watch_refuses_what_it_cannot_draw(here, hdit, arguments, told):
    status, _, err = hdit("watch", *arguments)
    assert status == 1
    assert told in err


CODE = """
import sys
from hdit import cli
try:
    cli.main()
finally:
    heavy = {"torch", "accelerate", "matplotlib"} & set(sys.modules)
    assert not heavy, heavy
"""


def started(*arguments):
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_watch_does_not_import_torch(here):
    process = started("watch", "a/run", "b/run")
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_watch_serves_until_ctrl_c(here):
    process = started("watch", "a/run", "--serve", "--port", "0")
    address = process.stdout.readline().strip()
    with urllib.request.urlopen(f"{address}data.json") as answer:
        assert json.load(answer)["runs"][0]["state"]["images"] == 40
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err
    assert not (here / "a" / "run" / "watch.html").exists()
