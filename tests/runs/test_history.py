"""What is read of a run while another process writes it."""

import json
import os
import socket

import pytest
import torch
from safetensors.torch import save_file

from hdit.errors import UserError
from hdit.reading import ReadingError
from hdit.runs.history import CHUNK, History, Tail, check_run, read_lines


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def at(images, **values):
    return {"images": images} | values


@pytest.fixture
def history(tmp_path):
    return History(tmp_path)


def losses(history):
    return history.metrics.table()["loss"].tolist()


def test_tail_reads_each_line_once_as_the_file_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.read()) == []
    write(path, at(1), at(2))
    assert [(line.number, line.images) for line in tail.read()] == [(1, 1), (2, 2)]
    append(path, json.dumps(at(3)) + "\n")
    assert [(line.number, line.images) for line in tail.read()] == [(3, 3)]
    assert list(tail.read()) == []


def test_tail_reads_a_cut_line_once_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, at(1))
    tail = Tail(path)
    append(path, '{"images": 2, "lo')
    assert [line.images for line in tail.read()] == [1]
    append(path, 'ss": 3}\n')
    assert [line.values for line in tail.read()] == [{"images": 2, "loss": 3}]
    assert tail.damaged == 0


@pytest.mark.parametrize("later", ['\n{"images": 3}\n', '\n{"images": 3}'])
def test_tail_takes_a_whole_line_whose_newline_comes_later(tmp_path, later):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    append(path, '{"images": 2}')
    assert [line.images for line in tail.read()] == [2]
    append(path, later)
    assert [line.images for line in tail.read()] == [3]
    assert tail.damaged == 0


@pytest.mark.parametrize(
    "bad",
    [b"", b"{", b"\xff", b"[1]", b"{}", b'{"images": -1}', b'{"images": 1, "loss": "x"}',
     b'{"images": true}', b'{"images": 9999999999999999999}', b"[" * 100 + b"]" * 100],
)  # fmt: skip
def test_damaged_line_in_the_middle_is_counted_and_passed_over(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"images": 1}\n' + bad + b'\n{"images": 2}\n')
    lines = read_lines(path)
    assert [line.images for line in lines.good] == [1, 2]
    assert [(line.number, line.text) for line in lines.damaged] == [(2, bad)]
    history = History(tmp_path)
    history.update()
    assert "1 damaged lines left out" in history.problems["metrics.jsonl"]


def test_history_forgets_what_a_rollback_took_back(tmp_path, history):
    path = tmp_path / "metrics.jsonl"
    write(path, at(1, loss=3.0), at(2, loss=2.0), at(3, loss=9.0))
    assert history.update()
    assert losses(history) == [3, 2, 9]
    write(tmp_path / "new", at(1, loss=3.0), at(2, loss=2.5))
    os.replace(tmp_path / "new", path)
    assert history.update()
    assert losses(history) == [3, 2.5]
    assert history.last == at(2, loss=2.5)
    assert not history.update()
    path.unlink()
    assert history.update()
    assert history.metrics.count == 0


def test_columns_hold_nan_for_what_is_no_finite_number(tmp_path, history):
    odd = [None, "x", True, [1], {"a": 1}, 10**400, 0.5]
    lines = [at(i, grad_norm=value, lr=1.0) for i, value in enumerate(odd)]
    write(tmp_path / "metrics.jsonl", *lines)
    history.update()
    table = history.metrics.table()
    assert table["lr"].tolist() == [1.0] * 7
    assert [i for i, n in enumerate(table["grad_norm"]) if n == n] == [6]
    assert "mfu" not in table


def test_columns_of_bins_have_nan_where_no_image_fell_in(tmp_path, history):
    lines = [at(1, loss_by_sigma=[None, *range(7)]), at(2, loss_by_sigma=[1]), at(3)]
    write(tmp_path / "metrics.jsonl", *lines)
    history.update()
    table = history.metrics.table()
    assert "loss_by_sigma.0" not in table
    assert table["loss_by_sigma.7"][0] == 6
    assert (table["loss_by_sigma.7"][1:] != table["loss_by_sigma.7"][1:]).all()


def test_columns_of_more_lines_than_a_chunk_keep_their_order(tmp_path, history):
    write(tmp_path / "metrics.jsonl", *(at(i, loss=-i) for i in range(CHUNK + 3)))
    history.update()
    first = history.metrics.table()
    append(tmp_path / "metrics.jsonl", json.dumps(at(CHUNK + 3, loss=-1.5)) + "\n")
    history.update()
    table = history.metrics.table()
    assert first["images"].tolist() == list(range(CHUNK + 3))
    assert table["loss"].tolist() == [*first["loss"].tolist(), -1.5]


def test_history_of_a_run_that_has_just_begun_is_empty(tmp_path, history):
    assert not history.update()
    assert (history.metrics.count, history.grids(), history.weights()) == (0, {}, None)
    assert history.written() is None


def test_validation_and_events_are_read_with_care(tmp_path, history):
    sound = at(5, weights={"ema": {"loss": 1.0}})
    write(tmp_path / "validation.jsonl", sound, at(6), at(7, weights=[]), at(8, weights={"a": 1}))
    write(tmp_path / "events.jsonl", at(1, kind="slow"), at(2), at(3, kind=4))
    history.update()
    assert history.validation == [sound]
    assert history.events == [at(1, kind="slow")]
    assert "3 damaged" in history.problems["validation.jsonl"]


def test_file_that_is_a_pipe_is_a_problem_and_no_error(tmp_path, history):
    os.mkfifo(tmp_path / "metrics.jsonl")
    history.update()
    assert "is a device or pipe" in history.problems["metrics.jsonl"]
    with pytest.raises(ReadingError, match="pipe"):
        read_lines(tmp_path / "metrics.jsonl")


def test_config_that_is_no_toml_is_a_problem_and_no_error(tmp_path, history):
    (tmp_path / "config.toml").write_text("a = [")
    assert history.update()
    assert "not valid TOML" in history.problems["config.toml"]
    assert (history.config, history.settings) == ("a = [", {})
    assert not history.update()


def test_grids_are_the_png_files_named_by_images(tmp_path, history):
    (tmp_path / "samples").mkdir()
    for name in ("000000000200.png", "000000000030.png", "a.png", "7.jpg", ".000000000009.png"):
        (tmp_path / "samples" / name).touch()
    (tmp_path / "samples" / "5.png").mkdir()
    assert list(history.grids()) == [30, 200]


def test_owner_is_the_process_of_the_lock_unless_it_is_dead(tmp_path, history):
    assert history.owner() is None
    here = socket.gethostname()
    for text, owned in (
        (f"process {os.getpid()} on {here}", True),
        (f"process 999999999 on {here}", False),
        ("process 999999999 on another-machine", True),
        ("", True),
    ):
        (tmp_path / ".lock").write_text(text)
        assert (history.owner() is not None) == owned, text


def test_weights_are_counted_from_the_head_of_the_newest_checkpoint(tmp_path, history):
    for images, size in ((32, 5), (64, 7)):
        folder = tmp_path / "checkpoints" / f"{images:012d}"
        folder.mkdir(parents=True)
        save_file({"a": torch.zeros(2, size), "b": torch.zeros(3)}, folder / "model.safetensors")
    assert history.weights() == 2 * 7 + 3
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    assert history.weights() == 2 * 5 + 3


def test_check_run_tells_what_a_path_is_instead(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "manifest.json").touch()
    for name, told in (
        ("none", "there is no such folder"),
        ("file", "is a file"),
        ("empty", "neither config.toml nor metrics.jsonl"),
        ("held", "is a checkpoint or a converted model"),
    ):
        with pytest.raises(UserError, match=told):
            check_run(tmp_path / name)
    (tmp_path / "empty" / ".lock").touch()
    check_run(tmp_path / "empty")


def test_tail_of_a_file_that_is_replaced_between_look_and_reading_reads_nothing_yet(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, at(1))
    tail = Tail(path)
    assert len(list(tail.read())) == 1
    assert not tail.is_other()
    write(tmp_path / "new", at(1), at(2), at(3))
    os.replace(tmp_path / "new", path)
    assert list(tail.read()) == []
    assert tail.is_other()
