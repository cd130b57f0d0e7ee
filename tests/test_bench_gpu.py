"""The GPU benchmark: its arithmetic of time, what it makes of failures, and its tables."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_attention
import bench_gpu
import bench_models
import bench_record
import bench_tools
import check_backends
import check_cli
import sample_ffhq1024
from bench_gpu import Bench, Outcome, Section, allowance
from bench_record import Record, markdown, shown
from hdit_kernels import flex, reference
from hdit_kernels.neighborhood import Problem

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


# ---- commands ------------------------------------------------------------------------------------


def parse_hdit(words):
    """Parses a command line of hdit, and loads the config that `train` is given."""
    import typer

    from hdit.cli.app import app
    from hdit.config.schema import load

    group = typer.main.get_command(app)
    with group.make_context("hdit", list(words)) as context:
        _, command, rest = group.resolve_command(context, list(words))
        with command.make_context(words[0], rest) as inner:
            if words[0] == "train":
                load(words[1], inner.params["overrides"] or [])
            return inner.params


def parse_words(words, monkeypatch):
    """Parses a command by what it starts -> (script or "hdit", options)."""
    assert words[0] == sys.executable
    if words[1:3] == ["-c", bench_gpu.CAPPED]:
        assert 0 < float(words[3]) <= 0.25
        words = [words[0], *(["-m"] if not words[4].endswith(".py") else []), *words[4:]]
    if words[1:3] == ["-m", "hdit.cli"]:
        return "hdit", parse_hdit(words[3:])
    parsers = {
        "bench_attention.py": bench_attention.parse,
        "bench_models.py": bench_models.parse,
        "check_backends.py": check_backends.parse,
        "check_cli.py": check_cli.parse,
        "sample_ffhq1024.py": lambda words: sample_ffhq1024.arguments(),
    }
    assert Path(words[1]).is_file()
    monkeypatch.setattr(sys, "argv", words[1:])
    return Path(words[1]).name, parsers[Path(words[1]).name](words[2:])


@pytest.fixture
def on_cuda(tmp_path):
    """A bench for CUDA, as on the machine with the GPU; nothing runs."""
    (tmp_path / "images").mkdir()
    return Bench(tmp_path, tmp_path, "cuda", False, tmp_path / "images")


def test_commands_that_warm_on_cuda_are_what_their_scripts_take(on_cuda, monkeypatch):
    found = []
    for command in bench_gpu.warming(on_cuda, bench_gpu.NUMBERS).values():
        if command[:2] == ["sh", "-c"]:
            words = shlex.split(command[2])
            at = words.index("&&")
            found += [words[:at], words[at + 1 :]]
        else:
            found.append(command)
    parsed = [parse_words(command, monkeypatch) for command in found]
    assert [name for name, _ in parsed].count("hdit") == 2
    sides = {side for _, side, _, _ in bench_attention.CUDA_SHAPES}
    names = {f"flex: {name}" for name in flex.VARIANTS}
    problem = Problem("cuda", torch.bfloat16, 64, 64, 7, 64, True, (9, 0))
    names |= {f"triton: {name}" for name in bench_attention.plans(problem)}
    models = {name for name, *_ in bench_models.STEPS}
    for script, options in parsed:
        if script == "bench_attention.py":
            assert options.warm
            assert set(options.side) <= sides
            for beginning in options.contender:
                assert any(name.startswith(beginning) for name in names), beginning
        elif script == "bench_models.py":
            assert options.warm
            assert set(options.model) <= models
        elif script == "sample_ffhq1024.py":
            assert options.steps == 2


def test_commands_of_the_sections_on_cuda_are_what_their_scripts_take(on_cuda, monkeypatch):
    commands = {n: c for n, c in bench_gpu.checks(on_cuda, 90).items() if n != "tests"}

    def outcome(given, *rest):
        commands.update(given)
        if "show-train" in given:
            (on_cuda.work / "show" / "checkpoints" / "0001").mkdir(parents=True)
        return Outcome("done")

    monkeypatch.setattr(on_cuda, "outcome", outcome)
    for section in bench_gpu.sections([2, 3, 4, 6]):
        assert section.run(on_cuda, 100) == Outcome("done")
    parsed = {name: parse_words(command, monkeypatch) for name, command in commands.items()}
    assert set(parsed) == {
        "backends", "cli", "attention", "models", "megapixel", "show-train", "show-sample",
    }  # fmt: skip
    assert parsed["show-train"][1]["minutes"] == pytest.approx((100 - 55) / 60)


def test_model_to_show_samples_from_a_checkpoint_however_training_ended(bench, monkeypatch):
    ran = []

    def outcome(given, seconds, *rest):
        ran.extend(given)
        if "show-train" in given:
            (bench.work / "show" / "checkpoints" / "0001").mkdir(parents=True)
            return Outcome("show-train was cut off after 9 s")
        return Outcome("show-sample failed with status 1", failed=True)

    monkeypatch.setattr(bench, "outcome", outcome)
    found = bench_gpu.show(bench, 90)
    assert ran == ["show-train", "show-sample"]
    assert found.failed
    assert found.status == "show-train was cut off after 9 s; show-sample failed with status 1"


@pytest.mark.parametrize("module", [False, True])
def test_capped_process_runs_what_it_would_without_a_cap(tmp_path, module):
    (tmp_path / "beside.py").write_text("it = 'beside'")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside; print(__name__, sys.argv[1:], beside.it)")
    start = ["-m", "script"] if module else [str(script)]
    command = bench_gpu.capped([sys.executable, *start, "--a", "b"], 0.1)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "__main__ ['--a', 'b'] beside\n"


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
    with bench.group() as group:
        group.start({"it": python(code)})
        while not (child.exists() and child.read_text()):
            time.sleep(0.02)
        group.wait(time.monotonic() + 0.1)
        outcome = bench_gpu.outcome_of(group.jobs, 0.1)
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


def right(bench, monkeypatch, own, warm, seconds=30.0):
    monkeypatch.setattr(bench_gpu, "checks", lambda bench, seconds: own)
    return bench_gpu.right(bench, seconds, warm)


def test_section_1_has_failed_where_a_check_is_cut_off(bench, monkeypatch):
    own = {"tests": python("pass"), "backends": python("import time; time.sleep(60)")}
    outcome = right(bench, monkeypatch, own, {}, 1.0)
    assert outcome == Outcome("backends was cut off after 1 s", failed=True)


def test_what_warms_waits_for_its_turn_and_says_why_it_failed(bench, monkeypatch, capsys):
    """No more than so many at once; those that time runs out for are named."""
    monkeypatch.setattr(bench_gpu, "WARM_AT_ONCE", 1)
    monkeypatch.setattr(bench_gpu, "WARM_AFTER", 1)
    order = bench.work / "order"
    note = f"open({str(order)!r}, 'a').write"
    code = f"import time; {note}('('); time.sleep(0.2); {note}(')')"
    warm = {"a": python(code), "b": python(code + "; raise SystemExit('no such side')")}
    assert right(bench, monkeypatch, {"tests": python("pass")}, warm) == Outcome("done")
    assert order.read_text() == "()()"
    said = capsys.readouterr().out
    assert "b failed; the end of its output:\nno such side\n" in said
    assert "b ended with status 1: what comes may compile longer" in said
    warm = {"c": python("import time; time.sleep(60)"), "d": python("pass")}
    right(bench, monkeypatch, {"tests": python("pass")}, warm, 1.0)
    said = capsys.readouterr().out
    assert "c was not through" in said
    assert "d was not started" in said


def test_files_of_tests_for_a_gpu_are_found_kernels_first():
    found = bench_gpu.gpu_tests()
    assert found[0].startswith("tests/kernels/")
    assert {
        "tests/kernels/test_triton.py",
        "tests/kernels/test_flex.py",
        "tests/doctor/test_doctor.py",
    } <= (set(found))
    assert "tests/test_cli.py" not in found


SAID_BY_PYTEST = """
created: 2/2 workers

test_a.py::test_p[a b]
[gw0] [ 14%] PASSED test_a.py::test_p[a b]
[gw1] [ 42%] SKIPPED test_a.py::test_s
[gw1] [ 57%] ERROR test_a.py::test_e
test_a.py::test_f
[gw0] [ 71%] FAILED test_a.py::test_f
test_a.py::test_long
"""
END_OF_PYTEST = """
FAILED test_a.py::test_f - assert 0
ERROR test_a.py::test_e - ValueError: x
ERROR test_b.py - ImportError: y
========= 1 failed, 1 passed, 1 skipped, 2 errors in 18.76s ==========
"""


def said_by_pytest(text, status):
    return SimpleNamespace(said=lambda: text, process=SimpleNamespace(poll=lambda: status))


@pytest.mark.parametrize("spread", [True, False])
def test_tests_are_counted_also_where_they_are_cut_off(spread):
    text = SAID_BY_PYTEST
    if not spread:
        text = re.sub(r"^\[gw.*\] (\S+) (.*)$", r"\2 \1 (PASSED) [ 57%]", text, flags=re.MULTILINE)
    row = bench_gpu.row_of_tests(said_by_pytest(text, None))
    assert row["how"] == (
        "cut off after 1 passed, 1 failed, 1 error, 1 skipped; failed: test_a.py::test_e; "
        "failed: test_a.py::test_f"
    )
    assert not row["right"]
    row = bench_gpu.row_of_tests(said_by_pytest(text + END_OF_PYTEST, 1))
    assert row["how"] == (
        "1 failed, 1 passed, 1 skipped, 2 errors in 18.76s; failed: test_a.py::test_e; "
        "failed: test_a.py::test_f; failed: test_b.py"
    )


# ---- the report ----------------------------------------------------------------------------------

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "torch": "2.11.0"}


def test_report_has_a_table_of_each_section_and_what_became_of_the_others():
    right = [
        {"check": "a", "how": "fp32", "relative error": 1e-6, "at most": 1e-4, "right": True},
        {"check": "a", "how": "bf16", "relative error": 3e-2, "at most": 2e-2, "right": False},
        {"check": "pytest -m gpu", "how": "9 passed", "right": True},
    ]
    times = [
        {"problem": "64x64", "contender": "flex: default", "ms": 0.1234, "list": [1]},
        {"problem": "64x64", "contender": "triton: one pass", "ms": 0.0312, "list": None},
    ]
    data = {
        1: {"rows": right, "errors": []},
        2: {"rows": times, "errors": ["natten: ImportError: not there"] * 2},
    }
    chosen = bench_gpu.sections([1, 2, 3])
    outcomes = {1: Outcome("backends failed with status 1", True), 2: Outcome("done")}
    outcomes[3] = Outcome("passed over: 30 s are of use, 4 left")
    text = bench_gpu.report("the command", "2030-01-02", chosen, outcomes, data, MACHINE)
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


def test_report_names_the_capability_in_the_section_with_the_figures():
    """There the test of `auto` looks for both before it lets a table name triton."""
    row = {"problem": "64x64", "direction": "both", "contender": "triton: product", "ms": 0.25}
    data = {2: {"rows": [row], "errors": []}}
    chosen = bench_gpu.sections([2])
    text = bench_gpu.report("it", "today", chosen, {2: Outcome("done")}, data, MACHINE)
    (section,) = [part for part in re.split(r"^#+ ", text, flags=re.MULTILINE) if "ms" in part]
    assert "capability 9.0," in section
    assert re.search(r"^\|(.*\|)? *triton\b.*\|.*\d", section, re.MULTILINE)


def test_figures_of_all_sections_are_folded_into_one_file(tmp_path, monkeypatch):
    """A session with a GPU may bring back eight files, and packs its caches into one of them."""
    chosen = bench_gpu.sections([1, 2, 6])
    rows = {"1-right": [{"check": "a"}], "2-attention": [{"ms": 1.0}]}
    for name, found in rows.items():
        bench_record.write(
            tmp_path / f"{name}.json",
            json.dumps({"machine": MACHINE, "rows": found, "errors": []}),
        )
    (tmp_path / ".2-attention.json.partial").write_text("{")
    outcomes = {1: Outcome("done", seconds=3.0)}
    bench_gpu.fold(tmp_path, chosen, outcomes, "cpu")
    assert (tmp_path / "2-attention.json").exists(), "of a section that goes on"
    outcomes |= {2: Outcome("failed"), 6: Outcome("passed over")}
    found = bench_gpu.fold(tmp_path, chosen, outcomes, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["sections.json"]
    assert found == json.loads((tmp_path / "sections.json").read_text())
    assert found["machine"] == MACHINE
    assert found["sections"]["right"]["rows"] == rows["1-right"]
    assert found["sections"]["right"]["seconds"] == 3.0
    assert found["sections"]["attention"]["status"] == "failed"
    assert found["sections"]["show"]["rows"] == []


def test_section_that_names_no_machine_has_it_asked_for(tmp_path):
    data = {"machine": {}, "rows": [{"loss": 1.0}], "errors": []}
    (tmp_path / "6-show.json").write_text(json.dumps(data))
    found = bench_gpu.fold(tmp_path, bench_gpu.sections([6]), {6: Outcome("done")}, "cpu")
    assert found["machine"]["device"].startswith("CPU (")


def test_commit_is_that_of_the_environment_where_git_knows_none(monkeypatch, capsys):
    monkeypatch.delenv("HDIT_COMMIT", raising=False)
    monkeypatch.setattr(bench_record, "output_of", lambda command: None)
    assert "commit" not in bench_tools.machine(CPU)
    assert "warning: the commit is not known; name it in HDIT_COMMIT" in capsys.readouterr().err
    monkeypatch.setenv("HDIT_COMMIT", "abc1234")
    assert bench_tools.machine(CPU)["commit"] == "abc1234"
    assert not capsys.readouterr().err


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


def failing_after(calls, message="illegal address"):
    """A call that goes well so many times."""
    made = []

    def call(*ignored):
        made.append(1)
        if len(made) > calls:
            raise RuntimeError(message)

    return call


def test_call_that_fails_in_rounds_is_named():
    contenders = {"a": lambda: None, "b": failing_after(2)}
    with pytest.raises(bench_tools.CallFailed, match="b: RuntimeError: illegal address") as caught:
        bench_tools.rounds(contenders, 3, CPU)
    assert caught.value.name == "b"


def timed(ready, record, shape=(1, 9, 10, 2)):
    contenders = dict.fromkeys(["a", "b"], bench_attention.Contender(None, None))
    ceilings = bench_tools.matmul(CPU, torch.float32, 8), bench_tools.copy(CPU, 64)
    arguments = SimpleNamespace(device="cpu", dtype="float32", pairs=3)
    return bench_attention.timed(ready, contenders, ceilings, shape, "forward", arguments, record)


def test_contender_that_fails_while_timed_is_left_out_and_the_others_are_timed():
    ready = {
        "a": bench_attention.Ready(lambda: None, 1, None, "calls"),
        "b": bench_attention.Ready(failing_after(2), 1, None, "calls"),
    }
    record = Record(None)
    rows = timed(ready, record)
    assert [row["contender"] for row in rows[2:]] == ["a"]
    assert list(ready) == ["a"]
    assert record.errors == [
        "1x9x10x2, forward, b, while it was timed: RuntimeError: illegal address"
    ]


def test_contender_that_breaks_the_context_while_timed_is_named(monkeypatch):
    def lost(what, device):
        raise bench_tools.DeviceLost(what)

    monkeypatch.setattr(bench_attention, "check_context", lost)
    ready = {"b": bench_attention.Ready(failing_after(1), 1, None, "calls")}
    with pytest.raises(bench_tools.DeviceLost, match=r"^b$"):
        timed(ready, Record(None))


def test_contender_without_gradient_is_timed_forward_and_says_why_not_both():
    """As flex's blocks of 64 in bfloat16."""
    problem = Problem("cuda", torch.bfloat16, 64, 64, 7, 64, True, (9, 0))
    able = {name: v for name, v in flex.VARIANTS.items() if not v.unsupported(problem)}
    once = problem._replace(grad=False)
    forward = {name: v for name, v in flex.VARIANTS.items() if not v.unsupported(once)}
    record = Record(None)
    arguments = SimpleNamespace(contender=["flex"], without=[])
    found = bench_attention.by_direction(problem, arguments, record)
    assert list(found["both"]) == [f"flex: {name}" for name in able]
    assert list(found["forward"]) == [f"flex: {name}" for name in forward]
    for name in forward:
        contender = found["forward"][f"flex: {name}"]
        assert (contender.both is None) == (name not in able)
        if name not in able:
            reason = flex.VARIANTS[name].unsupported(problem)
            assert f"flex: {name}, both: {reason}" in record.errors
    said = list(record.errors)
    bench_attention.by_direction(problem, arguments, record)
    assert record.errors == said, "once, and not for each shape"


def test_contender_without_gradient_computes_none():
    contender = bench_attention.without_gradient(lambda q, k, v: q + k + v)
    assert contender.both is None
    assert not contender.forward(*inputs()[:3]).requires_grad


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
    monkeypatch.setattr(sys, "argv", commands[0][1:])
    with pytest.raises(SystemExit, match="triton: product broke the CUDA context again"):
        bench_attention.main()
    assert len(commands) == 1, "it does not begin anew for ever"


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


@pytest.mark.parametrize("name", list(check_backends.SPECS))
def test_models_to_check_have_a_finite_loss(name):
    model = check_backends.Model(name, CPU)
    loss, gradients = model.loss_and_gradients(torch.float32, compiled=False)
    assert loss.isfinite()
    assert gradients.isfinite().all()


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
    assert "warm-models" not in said, "it went through"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["benchmarks.md", "grid.png", "log.txt", "sections.json"]
    sections = json.loads((tmp_path / "out" / "sections.json").read_text())["sections"]
    rows = sections["right"]["rows"]
    assert all(row["right"] for row in rows)
    assert {"pytest -m gpu", "HDiT, cpu", "DiT, flash", "hdit encode", "hdit evaluate"} <= {
        row["check"] for row in rows
    }
    contenders = [row["contender"] for row in sections["models"]["rows"]]
    assert {"hdit, compiled", "diffusers, compiled", "hdit, eager"} <= set(contenders)
    assert (tmp_path / "out" / "benchmarks.md").read_text() in said
