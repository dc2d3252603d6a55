"""What the benchmark suite makes of its samples: intervals, goals, history, files, pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

from udlkernels.benchmarks import benchmarks, chart, environment, history, report, summary
from udlkernels.benchmarks.declaration import Case, OverheadCase, Row
from udlkernels.benchmarks.results import Measured, Run, read_rows, write_atomically
from udlkernels.benchmarks.settings import Plan, Settings
from udlkernels.benchmarks.suite import compare_with_history
from udlkernels.benchmarks.timing import geometric_mean, ratio_interval

ALL = benchmarks()


def _measured(ours=(1.0,), eager=(2.0,), copy=(0.5,), **changes):
    """A row of rms_norm with the samples given."""
    row = Measured(
        id="rms_norm/gpt2-8x8/fp32/step",
        op="rms_norm",
        shape="gpt2-8x8",
        group="model",
        layout="contiguous",
        dtype="fp32",
        phase="step",
        threads=1,
        bytes=1024,
        flops=0,
        floor=0.5,
        least=0.5,
        samples={"ours": list(ours), "eager": list(eager), "copy": list(copy)},
        memory={"ours": 1, "eager": 2},
    )
    return dataclasses.replace(row, **changes)


@pytest.mark.parametrize(
    ("seconds", "flags"),
    [
        pytest.param(1.0, [], id="possible"),
        pytest.param(0.9, [], id="within-noise"),
        pytest.param(0.8, ["suspect"], id="impossible"),
    ],
)
def test_faster_than_the_floor_is_flagged(seconds, flags):
    row = _measured(ours=[seconds] * 5, least=1.0)
    row.judge()
    assert row.flags == flags
    assert row.counts == (not flags)


# Figures


def test_interval_of_a_constant_ratio_is_a_point():
    assert ratio_interval([1.0] * 9, [3.0] * 9) == (3.0, 3.0, 3.0)


def test_interval_holds_the_true_ratio_and_shrinks_with_samples():
    noise = np.random.default_rng(0).lognormal(0, 0.2, (2, 400))
    ratio, low, high = ratio_interval(noise[0, :10], 2 * noise[1, :10])
    many, lower, upper = ratio_interval(noise[0], 2 * noise[1])
    assert low < ratio < high
    assert lower < 2.0 < upper
    assert lower < many < upper
    assert upper - lower < high - low


def test_drift_of_the_machine_does_not_widen_the_interval():
    drift = np.linspace(1, 3, 50)
    ratio, low, high = ratio_interval(drift, 2 * drift)
    assert low == high == ratio == 2.0


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0]) == 2.0
    assert math.isnan(geometric_mean([]))


# Goals


def _outcome(rows, *, goal=None, share=None, **options):
    case = Case("rms_norm", "step", torch.float32, goal, share)
    declared = [b for b in ALL if b.op == "rms_norm"]
    found = summary.outcomes(rows, declared, [case], [], {}, **options)
    return next(outcome for outcome in found if outcome.case == case.name)


@pytest.mark.parametrize(
    ("ratios", "goal", "passed"),
    [
        pytest.param([2.0, 8.0], 4.0, True, id="mean-reaches-it"),
        pytest.param([2.0, 7.0], 4.0, False, id="mean-below"),
        pytest.param([0.9, 100.0], 4.0, False, id="one-shape-slower"),
    ],
)
def test_case_wants_the_mean_and_no_slower_shape(ratios, goal, passed):
    rows = [_measured(eager=[r], shape=str(i), copy=[0.1]) for i, r in enumerate(ratios)]
    assert _outcome(rows, goal=goal).passed is passed


def test_shape_at_the_ceiling_passes_whatever_its_ratio():
    rows = [_measured(eager=[0.9], copy=[0.9]), _measured(eager=[100.0], shape="b", copy=[0.1])]
    assert _outcome(rows, goal=4.0).passed


def test_share_of_the_ceiling_is_the_other_way_to_a_goal():
    row = _measured(eager=[1.1], copy=[0.9])
    assert _outcome([row], goal=1.5, share=0.85).passed
    assert not _outcome([row], goal=1.5).passed


def test_fallback_counts_for_nothing():
    fallback = _measured(eager=[100.0], shape="b", flags=["torch"])
    outcome = _outcome([_measured(eager=[2.0]), fallback], goal=3.0)
    assert not outcome.passed
    assert outcome.rows == "1 of 2"
    assert not _outcome([fallback], goal=3.0).passed


def test_wrong_row_fails_its_case():
    wrong = _measured(shape="b", flags=["wrong"], samples={})
    assert not _outcome([_measured(eager=[9.0]), wrong], goal=3.0).passed


def test_slower_than_compiled_fails():
    samples = {"ours": [1.0], "eager": [9.0], "compile": [0.8]}
    assert not _outcome([_measured(samples=samples)], goal=3.0).passed


LONG = dataclasses.replace(ALL[0].shapes[0], name="long", tags=("causal", "T>=2048"))


@pytest.mark.parametrize(
    ("where", "covered"),
    [((), True), (("causal",), True), (("long", "causal"), True), (("causal", "short"), False)],
)
def test_case_names_shapes_by_all_its_words(where, covered):
    case = Case("rms_norm", "step", torch.float32, where=where)
    assert case.covers("rms_norm", "step", "fp32", "contiguous", LONG.words) is covered


def test_case_of_some_shapes_leaves_out_the_others():
    rows = [
        _measured(eager=[9.0], words=["a", "causal"]),
        _measured(eager=[1.5], words=["b", "full"], shape="b"),
    ]
    causal = Case("rms_norm", "step", torch.float32, 4.0, where=("causal",))
    declared = [b for b in ALL if b.op == "rms_norm"]
    found = {o.case: o for o in summary.outcomes(rows, declared, [causal], [], {})}
    assert found["rms_norm step fp32 causal"].passed
    assert found["rms_norm step fp32 causal"].rows == "1 of 1"
    assert found["rms_norm step fp32"].rows == "2 of 2"  # shown all the same


@pytest.mark.parametrize(
    ("dense", "per_flop", "passed"),
    [
        pytest.param(6.0, False, True, id="time"),
        pytest.param(5.9, False, False, id="time-below"),
        pytest.param(59.0, True, False, id="flops-below"),
        pytest.param(60.0, True, True, id="flops"),
    ],
)
def test_case_may_be_a_ratio_to_another_peer(dense, per_flop, passed):
    samples = {"ours": [1.0], "eager": [0.5], "dense": [dense], "copy": [0.1]}
    row = _measured(samples=samples, flops=10, peer_flops={"dense": 100})
    case = Case(
        "rms_norm", "step", torch.float32, 6.0, peer="dense", per_flop=per_flop, where=("a",)
    )
    row.words = ["a"]
    found = summary.outcomes([row], [], [case], [], {})
    assert [(outcome.case, outcome.passed) for outcome in found] == [(case.name, passed)]


@pytest.mark.parametrize(("ratio", "passed"), [(0.9, True), (0.8, False)])
def test_goal_below_one_is_no_loss(ratio, passed):
    assert _outcome([_measured(eager=[ratio], copy=[0.1])], goal=0.85).passed is passed


@pytest.mark.parametrize(("ours", "passed"), [(1, True), (2, False)])
def test_case_may_limit_the_memory_of_every_shape(ours, passed):
    rows = [
        _measured(eager=[9.0], memory={"ours": 1, "eager": 9}),
        _measured(eager=[9.0], memory={"ours": ours, "eager": 4}, shape="b"),
    ]
    case = Case("rms_norm", "step", torch.float32, 2.0, memory=0.25)
    (found,) = summary.outcomes(rows, [], [case], [], {})
    assert found.passed is passed
    assert f"memory {ours / 4:.2f}x" in found.measured


def test_case_of_memory_fails_where_none_was_measured():
    case = Case("rms_norm", "step", torch.float32, 2.0, memory=0.25)
    (found,) = summary.outcomes([_measured(eager=[9.0], memory={})], [], [case], [], {})
    assert not found.passed


def _other(text, rows, **options):
    declared = [b for b in ALL if b.op in ("rms_norm", "add_rms_norm")]
    overheads = [OverheadCase("rms_norm", "step", 4.0)]
    found = summary.outcomes(rows, declared, [], overheads, options.get("scaling", {}))
    return next(outcome for outcome in found if text in outcome.case)


@pytest.mark.parametrize(("extra", "passed"), [(3e-6, True), (5e-6, False)])
def test_overhead_is_counted_in_microseconds(extra, passed):
    row = _measured(ours=[1e-5 + extra], eager=[1e-5], group="overhead", shape="tiny-8x16")
    assert _other("1 thread", [row]).passed is passed


@pytest.mark.parametrize(("seconds", "passed"), [(1.1, True), (1.2, False)])
def test_odd_widths_are_held_against_their_twins(seconds, passed):
    rows = [
        _measured(ours=[1.0], group="odd", shape="round"),
        _measured(ours=[seconds / 2], group="odd", shape="odd", twin="round", floor=0.25),
    ]
    assert _other("odd sizes", rows).passed is passed


@pytest.mark.parametrize(
    ("op", "ours", "passed"),
    [("rms_norm", 2, True), ("rms_norm", 3, False), ("add_rms_norm", 2, False)],
)
def test_memory_may_not_exceed_the_peers_and_fused_ops_stay_below(op, ours, passed):
    row = _measured(op=op, memory={"ours": ours, "eager": 2})
    assert _other("memory", [row]).passed is passed


@pytest.mark.parametrize(("two", "passed"), [(0.5, True), (0.7, False)])
def test_scaling_to_all_threads(two, passed):
    times = {"rms_norm/a/fp32": {"1": 1.0, "2": two}}
    assert _other("threads", [], scaling=times).passed is passed


# History


def _history(tmp_path, *runs):
    fallen = []
    for ratio in runs:
        record = history.History(tmp_path / "history.json", "machine")
        fallen = record.add({"row": ratio})
        record.save()
    return fallen


def test_row_fallen_twice_running_is_reported(tmp_path):
    assert _history(tmp_path, 10.0, 10.0, 5.0) == []
    fallen = _history(tmp_path, 5.5)
    assert [str(fall) for fall in fallen] == ["row: 5.50x, recorded 10.00x"]


def test_row_that_recovered_is_not_reported(tmp_path):
    assert _history(tmp_path, 10.0, 5.0, 9.0, 5.0) == []


def test_low_runs_do_not_lower_the_record(tmp_path):
    _history(tmp_path, 10.0, 1.0, 1.0, 1.0)
    assert history.History(tmp_path / "history.json", "machine").recorded("row") == 10.0


def test_each_machine_has_its_own_record(tmp_path):
    _history(tmp_path, 10.0)
    assert history.History(tmp_path / "history.json", "another").low({"row": 1.0}) == []
    assert history.History(tmp_path / "history.json", "machine").low({"row": 1.0}) == ["row"]


def test_history_keeps_rows_that_count_only():
    rows = [_measured(), _measured(id="b", flags=["torch"]), _measured(id="c", group="overhead")]
    assert history.ratios(rows) == {"rms_norm/gpt2-8x8/fp32/step": 2.0}


class _Again:
    """A runner that gives one row the ratios of a list, one at each measurement."""

    def __init__(self, ratios):
        self.ratios = list(ratios)
        benchmark = ALL[0]
        self.plan = Plan([Row(benchmark, benchmark.shapes[0], torch.float32)])
        self.id = f"{self.plan.rows[0].id}/step"

    def measure(self, row):
        return [_measured(id=self.id, eager=[self.ratios.pop(0)])]


@pytest.mark.parametrize(
    ("ratios", "fallen"),
    [
        pytest.param([9.0], [], id="fine"),
        pytest.param([2.0, 9.0], [], id="low-once"),
        pytest.param([2.0, 3.0], [3.0], id="low-twice"),
    ],
)
def test_low_row_is_measured_again_in_the_same_run(tmp_path, ratios, fallen):
    runner = _Again(ratios)
    record = history.History(tmp_path / "history.json", environment.machine())
    record.add({runner.id: 10.0})
    record.save()
    settings = Settings(history=tmp_path / "history.json")
    found = compare_with_history(settings, runner, runner.measure(runner.plan.rows[0]))
    assert [fall.ratio for fall in found] == fallen
    assert runner.ratios == []


# Files, settings, pictures


def test_json_holds_raw_samples_and_is_read_back(tmp_path):
    row = _measured(ours=[1.0, 1.5], eager=[2.0, 3.0], copy=[0.5, 0.5])
    run = Run(environment.describe(torch.device("cpu")), {}, {}, [row])
    write_atomically(tmp_path / "bench.json", run.to_json())
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["rows"][0]["samples"] == row.samples
    assert list(found["rows"][0]["ratio"]) == ["eager"]
    assert found["rows"][0]["ratio"]["eager"][0] == 2.0
    for fact in ("torch", "processor", "commit", "isa", "allocator", "threads", "torch_flags"):
        assert fact in found["environment"]
    assert read_rows(tmp_path / "bench.json") == [row]


def test_rows_of_an_older_file_are_read(tmp_path):
    found = json.loads(Run({}, {}, {}, [_measured()]).to_json())
    del found["rows"][0]["words"]
    (tmp_path / "bench.json").write_text(json.dumps(found))
    assert read_rows(tmp_path / "bench.json") == [_measured()]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    write_atomically(path, "old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("udlkernels.benchmarks.results.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_picture_shows_losses_and_wins(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [_measured(), _measured(dtype="bf16", eager=[0.5])]
    assert chart.draw(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["bench.png"]


def test_nothing_to_draw(tmp_path):
    assert not chart.draw([_measured(flags=["wrong"])], tmp_path / "bench.png")


@pytest.mark.parametrize("installed", [True, False], ids=["rich", "plain"])
def test_table_shows_wins_losses_and_reasons(capsys, monkeypatch, installed):
    if not installed:
        for name in ("rich", "rich.console", "rich.table", "rich.text"):
            monkeypatch.setitem(sys.modules, name, None)
    rows = [
        _measured(id="rms_norm/win/fp32/step", shape="win"),
        _measured(id="rms_norm/loss/fp32/step", shape="loss", eager=[0.5]),
        _measured(id="rms_norm/bad/fp32/step", samples={}, flags=["wrong"], notes=["grad x: 9"]),
        _measured(id="rms_norm/back/fp32/step", flags=["torch"]),
        _measured(id="rms_norm/fast/fp32/step", flags=["suspect"]),
        _measured(id="rms_norm/more/fp32/step", shape="more"),
    ]
    rows[-1].samples["dense (ours)"] = [7.0]
    surroundings = {**environment.describe(torch.device("cpu")), "load": 3.0}
    goals = [Case("rms_norm", "step", torch.float32, goal=3.0)]
    found = summary.outcomes(rows, [b for b in ALL if b.op == "rms_norm"], goals, [], {})
    report.show(Run(surroundings, {}, {}, rows), found)
    lines = capsys.readouterr().out.splitlines()

    def line(text):
        return next(found for found in lines if text in found)

    assert "2.00x" in line("win/fp32/step")
    assert "0.50x" in line("loss/fp32/step")
    assert "wrong, grad x: 9" in line("bad/fp32/step")
    assert "counts for nothing" in line("back/fp32/step")
    assert "suspect" in line("fast/fp32/step") and "2.00x" not in line("fast/fp32/step")
    assert "7.00x [7.00, 7.00] of dense (ours)" in line("more/fp32/step")
    assert "not met" in line("rms_norm step fp32")
    assert line("load 3.0")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234e-6, "1.23 µs"), (0.0999, "99.9 ms"), (12.0, "12 s")]
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text
