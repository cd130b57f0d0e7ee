"""The GPU benchmark: its arithmetic of time, what it makes of failures, and its tables."""

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_attention
import bench_gpu
import bench_record
import bench_tools
import check_backends
import check_cli
from bench_gpu import Bench, Outcome, Section, allowance
from bench_record import Record, markdown, shown
from hdit_kernels import reference

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    return Bench(tmp_path / "out", tmp_path / "work", "cpu", True, None)


# ---- options -------------------------------------------------------------------------------------


def test_sections_are_read_in_their_order():
    assert bench_gpu.parse(["--out", "x"]).only == [1, 2, 3, 4, 6]
    assert bench_gpu.parse(["--out", "x", "--only", "4,1"]).only == [1, 4]
    assert [s.file for s in bench_gpu.sections([1, 4])] == ["1-right.json", "4-megapixel.json"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "5"], "there is no section 5; there are 1, 2, 3, 4, 6"),
        (["--only", "one"], "must read N,N,..., got 'one'"),
        (["--images", "nowhere"], "nowhere is no folder"),
        (["--device", "cpu"], "add --tiny"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, says, capsys):
    with pytest.raises(SystemExit):
        bench_gpu.parse(["--out", "x", *arguments])
    assert says in capsys.readouterr().err


def test_command_of_the_report_names_no_folder_of_the_machine(tmp_path):
    given = ["--out", "/mine", "--images", str(tmp_path), "--deadline", "460"]
    typed = bench_gpu.as_typed(bench_gpu.parse(given))
    assert typed == "python scripts/bench_gpu.py --out DIR --images FOLDER --deadline 460"


def test_config_of_the_model_to_show_is_valid_on_either_device(tmp_path, bench):
    from hdit.config import load

    small = load(bench_gpu.show_config(bench))
    assert small.data.kind == "shapes"
    for images in (None, tmp_path):
        large = Bench(tmp_path, tmp_path, "cuda", False, images)
        config = load(bench_gpu.show_config(large))
        assert config.data.shape == (3, 128, 128)
        assert config.training.compile is True
        assert config.training.precision == config.sampling.precision == "bf16"


# ---- time ----------------------------------------------------------------------------------------

CAPS = [90.0, 60.0, 130.0, 45.0, 120.0]


def test_caps_hold_where_there_is_time_and_are_scaled_where_there_is_not():
    assert allowance(90, CAPS[1:], math.inf) == 90
    assert allowance(90, CAPS[1:], sum(CAPS)) == 90
    assert allowance(90, CAPS[1:], sum(CAPS) / 2) == 45
    assert allowance(120, [], 30) == 30
    assert allowance(120, [], 500) == 120


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(caps, deadline, takes, tiny=False):
    """Runs sections that take what they are told to, or raise -> (outcomes, seconds given)."""
    clock, given = Clock(), {}

    def section(number, cap):
        def body(bench, seconds):
            given[number] = seconds
            took = takes.get(number, seconds)
            if isinstance(took, Exception):
                raise took
            clock.now += took
            return Outcome("done")

        return Section(number, f"section {number}", f"s{number}", cap, cap / 3, body)

    chosen = [section(number, cap) for number, cap in zip([1, 2, 3, 4, 6], caps, strict=False)]
    heard = []
    outcomes = bench_gpu.run_all(
        chosen, SimpleNamespace(tiny=tiny), deadline, lambda o: heard.append(dict(o)), clock
    )
    assert heard[-1] == outcomes
    assert [len(o) for o in heard] == list(range(1, len(chosen) + 1)), "a report after each"
    return outcomes, given


def test_sections_have_their_caps_and_the_last_the_rest():
    outcomes, given = run(CAPS, 460, {1: 50.0, 2: 20.0})
    assert [given[n] for n in (1, 2, 3, 4)] == [90, 60, 130, 45]
    assert given[6] == 460 - 50 - 20 - 130 - 45 - bench_gpu.GRACE
    assert {o.status for o in outcomes.values()} == {"done"}
    assert outcomes[2].seconds == 20


def test_without_a_deadline_the_last_has_its_cap():
    assert run(CAPS, None, {})[1] == dict(zip([1, 2, 3, 4, 6], CAPS, strict=True))


def test_tiny_sections_have_more_time_and_keep_the_deadline():
    assert run(CAPS, None, {}, tiny=True)[1][1] == bench_gpu.TINY_PATIENCE * 90
    assert run(CAPS, 460, {}, tiny=True)[1][1] == pytest.approx(460 * 90 / sum(CAPS))


def test_section_that_no_longer_fits_is_passed_over_and_says_so():
    outcomes, given = run(CAPS, 460, {1: 400.0})
    # 60 of the 355 seconds of those to come in the 60 that are left are 10, and 20 are of use
    assert outcomes[2].status == "passed over: 20 s are of use, 10 left"
    assert not outcomes[2].failed
    assert 2 not in given
    assert given[4] == pytest.approx(60 * 45 / 165), "its time goes to those after it"


def test_section_that_cannot_be_started_is_passed_over_and_the_next_one_runs():
    outcomes, given = run(CAPS, None, {2: OSError("no such program")})
    assert outcomes[2].failed
    assert outcomes[2].status == "failed: OSError: no such program"
    assert 3 in given


# ---- processes -----------------------------------------------------------------------------------


def python(code):
    return [sys.executable, "-c", code]


def test_failing_process_is_reported_with_the_end_of_its_output(bench, capsys):
    code = "print('first'); print('\\n' * 40 + 'the end'); raise SystemExit(3)"
    outcome = bench.outcome({"it": python(code), "other": python("print('fine')")}, 30)
    assert outcome == Outcome("it failed with status 3", failed=True)
    said = capsys.readouterr().out
    assert "the end" in said
    assert "first" not in said
    log = (bench.out / "log.txt").read_text()
    assert "==== it, status 3\nfirst" in log
    assert "==== other, status 0\nfine" in log


def test_process_past_its_cap_is_ended_with_what_it_started(bench, tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    with bench.jobs({"it": python(code)}) as jobs:
        while not (child.exists() and child.read_text()):
            time.sleep(0.02)
        bench.wait(jobs, time.monotonic() + 0.1)
        outcome = bench_gpu.outcome_of(jobs, 0.1)
    assert outcome == Outcome("it was cut off after 0 s", failed=False)
    assert time.monotonic() - started < 30
    path = Path("/proc", child.read_text(), "stat")
    for _ in range(100):  # until init has taken note
        if not path.exists() or path.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(int(child.read_text()), 9)
        pytest.fail("the child lives on")


def test_processes_see_no_gpu_where_a_cpu_is_asked_for(bench):
    code = "import os, hdit; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), hdit.__file__)"
    assert bench.outcome({"it": python(code)}, 60).status == "done"
    said = (bench.out / "log.txt").read_text()
    assert "'' " + str(bench_gpu.ROOT) in said


# ---- the report ----------------------------------------------------------------------------------

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "torch": "2.11.0"}


def test_report_has_a_table_of_each_section_and_what_became_of_the_others(tmp_path):
    right = [
        {"check": "a", "how": "fp32", "relative error": 1e-6, "at most": 1e-4, "right": True},
        {"check": "a", "how": "bf16", "relative error": 3e-2, "at most": 2e-2, "right": False},
        {"check": "pytest -m gpu", "how": "9 passed", "right": True},
    ]
    times = [
        {"problem": "64x64", "contender": "flex: default", "ms": 0.1234, "list": [1]},
        {"problem": "64x64", "contender": "triton: one pass", "ms": 0.0312, "list": None},
    ]
    for name, rows, errors in (
        ("1-right", right, []),
        ("2-attention", times, ["natten: ImportError: not there"] * 2),
    ):
        data = {"machine": MACHINE, "rows": rows, "errors": errors}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    chosen = bench_gpu.sections([1, 2, 3])
    outcomes = {1: Outcome("backends failed with status 1", True), 2: Outcome("done")}
    outcomes[3] = Outcome("passed over: 30 s are of use, 4 left")
    text = bench_gpu.report("the command", "2030-01-02", chosen, outcomes, tmp_path)
    about = "NVIDIA H100 80GB HBM3, capability 9.0, torch 2.11.0"
    assert text.startswith("## On NVIDIA H100 80GB HBM3\n\n```\nthe command\n```\n2030-01-02\n")
    assert (
        "| check | how | largest error, of the bound | right |\n| --- | --- | --- | --- |\n"
        "| a | 2 ways | 1.50 | no |\n| a | bf16 |  | no |\n| pytest -m gpu | 9 passed |  | yes |\n"
    ) in text
    assert (
        f"### Neighborhood attention\n\n{about}\n\n| problem | contender | ms |\n"
        "| --- | --- | --- |\n| 64x64 | flex: default | 0.12 |\n"
        "| 64x64 | triton: one pass | 0.031 |\n\nPassed over:\n\n- natten: ImportError: not there\n"
    ) in text
    assert "Section 1: backends failed with status 1." in text
    assert "Section 3: passed over: 30 s are of use, 4 left." in text


def test_report_names_the_capability_in_the_section_with_the_figures(tmp_path):
    """There the test of `auto` looks for both before it lets a table name triton."""
    row = {"problem": "64x64", "direction": "both", "contender": "triton: product", "ms": 0.25}
    data = {"machine": MACHINE, "rows": [row], "errors": []}
    (tmp_path / "2-attention.json").write_text(json.dumps(data))
    chosen = bench_gpu.sections([2])
    text = bench_gpu.report("it", "today", chosen, {2: Outcome("done")}, tmp_path)
    (section,) = [part for part in re.split(r"^#+ ", text, flags=re.MULTILINE) if "ms" in part]
    assert "capability 9.0," in section
    assert re.search(r"^\|(.*\|)? *triton\b.*\|.*\d", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (True, "yes"), (False, "no"), (3, "3"), ("a", "a"), (0.0, "0"),
        (1234.5, "1234"),
        (12.345, "12.3"), (1.2345, "1.23"), (0.12345, "0.12"), (0.012345, "0.012"),
        (1.2345e-7, "1.2e-07"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_cells_have_the_digits_that_count(value, text):
    assert shown(value) == text


def test_table_leaves_out_what_no_row_has():
    rows = [{"a": 1, "b": None, "c": [1]}, {"d": 2.5}]
    assert markdown(rows) == "| a | d |\n| --- | --- |\n| 1 |  |\n|  | 2.50 |"


def test_record_is_in_its_file_from_the_beginning_and_can_be_gone_on_with(tmp_path, capsys):
    path = tmp_path / "it.json"
    record = Record(path, {"device": "x"})
    assert json.loads(path.read_text()) == {"machine": {"device": "x"}, "rows": [], "errors": []}
    record.add({"ms": 1.0})
    record.fail("flex", RuntimeError("\n  out of memory\nand more"))
    assert "passed over: flex: RuntimeError: out of memory\n" in capsys.readouterr().out
    found = Record(path, {"device": "x"}, go_on=True)
    assert found.rows == [{"ms": 1.0}]
    assert found.errors == ["flex: RuntimeError: out of memory"]
    assert [p.name for p in tmp_path.iterdir()] == ["it.json"]


def test_write_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "it"
    bench_record.write(path, "old")

    def fail(self, text):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="disk full"):
            bench_record.write(path, "new")
    assert path.read_text() == "old"


# ---- timing --------------------------------------------------------------------------------------


def test_rounds_turn_and_ratios_are_taken_within_a_round(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench_tools.time, "perf_counter", clock)
    order = []

    def contender(name, seconds):
        def call():
            order.append(name)
            clock.now += seconds * (1 + len(order) // 5)  # a machine that slows down

        return call

    times = bench_tools.rounds({"a": contender("a", 1.0), "b": contender("b", 2.0)}, 3, CPU)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(t) for t in times.values()] == [3, 3]
    assert bench_tools.faster(times, "a", "b") == 2.0
    assert bench_tools.faster(times, "a", "c") is None


def test_each_set_of_inputs_is_used():
    seen = []
    run, number = bench_tools.repeated(seen.append, 3, CPU)
    run()
    assert (seen, number) == ([0, 1, 2], 3)


def test_failing_contender_is_recorded_and_passed_over():
    def fail():
        raise KeyError("plan")

    record = Record(None)
    assert bench_tools.attempt(record, "triton", fail, CPU) is None
    assert record.errors == ["triton: KeyError: 'plan'"]
    assert bench_tools.attempt(record, "flex", lambda: 3, CPU) == 3


def inputs():
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 9, 10, 2, bench_attention.D_HEAD) for _ in range(4))
    return bench_attention.Inputs(*(x.requires_grad_() for x in (q, k, v)), grad)


@pytest.mark.parametrize(
    ("factor", "says"), [(1.0, None), (1.01, "relative error is 0.01"), (math.nan, "is nan")]
)
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_contender_is_timed_only_if_it_is_right(factor, says, direction):
    def attention(q, k, v):
        out = reference.attention(q, k, v, bench_attention.KERNEL_SIZE, bench_attention.SCALE)
        return factor * out

    sets, record = [inputs()], Record(None)
    exact = bench_attention.reference_of(sets[0])
    contender = bench_attention.by_autograd(attention)
    ready = bench_attention.prepare("it", contender, direction, sets, exact, record)
    if says is None:
        assert ready.error < 1e-6
        assert ready.number == 1
    else:
        assert ready is None
        assert says in record.errors[0]


def test_floor_counts_each_input_and_output_once():
    """Of 2 x 16 x 16 x 2 x 64 float32: q, k, v and out, and for both grad and three gradients."""
    record = Record(None)
    arguments = SimpleNamespace(
        device="cpu", dtype="float32", pairs=1, warm=False, tiny=True, without=["natten"],
        contender=["cpu", "tile", "global, flash"],
    )  # fmt: skip
    bench_attention.cuda_bench((2, 16, 16, 2), arguments, record)
    size = 2 * 16 * 16 * 2 * 64 * 4
    work = 2 * 16 * 16 * 2 * 64 * 49  # multiply-adds of the logits; as many of the weighted sum
    for row in record.rows:
        if row["contender"] == "cpu":
            tensors, products = (4, 2) if row["direction"] == "forward" else (8, 7)
            seconds = row["ms"] / 1e3
            assert row["GB/s"] == pytest.approx(tensors * size / seconds / 1e9)
            assert row["TFLOP/s"] == pytest.approx(2 * products * work / seconds / 1e12)
    assert len([row for row in record.rows if row["contender"] == "cpu"]) == 2
    names = ["ceiling: device copy", "ceiling: matrix product", "cpu", "tile", "global, flash"]
    assert [row["contender"] for row in record.rows] == 2 * names
    del record.rows[-2]
    bench_attention.cuda_bench((2, 16, 16, 2), arguments, record)
    found = [(row["direction"], row["contender"]) for row in record.rows]
    assert len(found) == len(set(found)) == 10, "only what is missing is measured again"


def test_contender_that_breaks_the_context_is_left_out_by_a_process_that_goes_on(
    tmp_path, monkeypatch
):
    """Where nothing more can run, the same command begins anew, with the rows that are there."""
    commands = []

    def broken(shape, arguments, record):
        record.add({"problem": "before"})
        raise bench_tools.DeviceLost("triton: product")

    def execute(program, command):
        commands.append(command)
        raise SystemExit

    json_file = tmp_path / "rows.json"
    argv = ["bench_attention.py", "--tiny", "--json", str(json_file), "--without", "natten"]
    monkeypatch.setattr(bench_attention, "cuda_bench", broken)
    monkeypatch.setattr(bench_attention.os, "execv", execute)
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        bench_attention.main()
    assert commands == [[sys.executable, *argv, "--go-on", "--without", "triton: product"]]
    found = Record(json_file, go_on=True)
    assert found.rows == [{"problem": "before"}]
    assert "it broke the CUDA context" in found.errors[0]


# ---- right or not --------------------------------------------------------------------------------


def test_backend_that_is_wrong_is_found(monkeypatch):
    class Wrong:
        @staticmethod
        def unsupported(problem):
            return None

        @staticmethod
        def attention(q, k, v, kernel_size, scale):
            return reference.attention(q, k, v, kernel_size, 1.01 * scale)

    backends = {"wrong": Wrong, "reference": reference}
    monkeypatch.setattr(check_backends, "BACKENDS", backends)
    monkeypatch.setattr(check_backends.neighborhood, "BACKENDS", backends)
    monkeypatch.setattr(check_backends, "SHAPE", (1, 8, 9, 1, 64))
    record = Record(None)
    check_backends.check_attention(CPU, record)
    fp32 = [row for row in record.rows if row["how"].startswith("fp32")]
    assert [(row["check"], row["right"]) for row in fp32] == [
        ("attention, wrong", False), ("attention, wrong", False),
        ("attention, reference", True), ("attention, reference", True),
    ]  # fmt: skip


def test_failing_command_ends_a_chain_of_checks(tmp_path):
    record = Record(None)
    checks = check_cli.Checks(tmp_path, record, 60)
    checks.pixels()  # there is no config
    (row,) = record.rows
    assert not row["right"]
    assert re.search("it ended: .*pixels.toml", row["how"])


# ---- all of it -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_benchmark_runs_on_a_cpu_with_tiny_shapes(tmp_path, monkeypatch, capfd):
    argv = ["bench_gpu.py", "--out", str(tmp_path / "out"), "--device", "cpu", "--tiny"]
    monkeypatch.setattr(sys, "argv", argv)
    bench_gpu.main()
    said = capfd.readouterr().out
    for number in (1, 2, 3, 4, 6):
        assert f"section {number}: done" in said
    assert "warm-models ended" not in said
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "1-right.json", "2-attention.json", "3-models.json", "4-megapixel.json", "6-show.json",
        "benchmarks.md", "grid.png", "log.txt",
    ]  # fmt: skip
    rows = json.loads((tmp_path / "out" / "1-right.json").read_text())["rows"]
    assert all(row["right"] for row in rows)
    assert {"pytest -m gpu", "HDiT, cpu", "DiT, flash", "hdit encode", "hdit evaluate"} <= {
        row["check"] for row in rows
    }
    contenders = [
        row["contender"]
        for row in json.loads((tmp_path / "out" / "3-models.json").read_text())["rows"]
    ]
    assert {"hdit, compiled", "diffusers, compiled", "hdit, eager"} <= set(contenders)
    assert (tmp_path / "out" / "benchmarks.md").read_text() in said
