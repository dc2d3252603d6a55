"""The benchmark suite: its declarations, its gate, its flags, its figures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from udlkernels import functional
from udlkernels._errors import ArgumentError
from udlkernels.benchmarks import benchmarks, cases, gate
from udlkernels.benchmarks.contestant import Contestant, copied, draw
from udlkernels.benchmarks.declaration import (
    GROUPS,
    Benchmark,
    Cost,
    Input,
    Peer,
    Row,
    Shape,
)
from udlkernels.benchmarks.memory import peak_extra
from udlkernels.benchmarks.runner import Runner, scaling
from udlkernels.benchmarks.settings import Plan, Settings, parse, plan
from udlkernels.benchmarks.timing import Budget, CpuClock, sample

CPU = torch.device("cpu")
ALL = benchmarks()
ONCE = Budget(seconds=0.0, least=3, most=3)


def _eager(x):
    return x * x.sigmoid()


def _benchmark(run, *, size=(32, 64), cost=None, peer=_eager, grad=True, more=(), **options):
    """A made-up op, silu, whose public function is `run`."""
    moved = 8 * math.prod(size)
    return Benchmark(
        op="silu",
        family="made-up",
        shapes=(Shape("small", size, quick=True),),
        inputs=lambda shape: {"x": Input(shape.size, grad=grad)},
        run=lambda x, implementation: _eager(x) if implementation == "reference" else run(x),
        peers=(Peer("eager", peer), *more),
        cost=lambda shape, dtype: cost or Cost(moved, moved, 4, 8),
        **options,
    )


def _row(run, **options):
    benchmark = _benchmark(run, **options)
    return Row(benchmark, benchmark.shapes[0], torch.float32)


def _check(run, **options):
    row = _row(run, **options)
    return gate.check(row, draw(row, CPU))


# Declarations


def test_every_public_op_of_the_family_is_declared():
    declared = {benchmark.op for benchmark in benchmarks("normalization")}
    assert {name for name in functional.__all__ if name.endswith("norm")} <= declared


@pytest.mark.parametrize("declared", ALL, ids=lambda declared: declared.op)
def test_declaration_is_sane(declared):
    model = [shape for shape in declared.shapes if shape.group == "model"]
    ids = [shape.id for shape in declared.shapes]
    assert len(model) >= 6
    assert len(ids) == len(set(ids))
    assert any(shape.quick for shape in model)
    assert "overhead" in {shape.group for shape in declared.shapes}
    assert {shape.group for shape in declared.shapes} <= set(GROUPS)
    assert hasattr(functional, declared.op)
    for shape in declared.shapes:
        assert not shape.twin or shape.twin in ids
        assert math.prod(next(iter(declared.inputs(shape).values())).size) == shape.numel
        assert "/" not in shape.id


@pytest.mark.parametrize("declared", ALL, ids=lambda declared: declared.op)
def test_cost_grows_with_elements_and_their_width(declared):
    small, large = sorted(declared.shapes, key=lambda shape: shape.numel)[
        :: len(declared.shapes) - 1
    ]
    cost, wider = (declared.cost(small, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert declared.cost(large, torch.float32).bytes("step") > wider.bytes("step")
    assert wider.bytes("step") == 2 * cost.bytes("step")
    assert wider.bytes("step") == wider.bytes("forward") + wider.bytes("backward")
    assert wider.bytes("forward") >= 2 * 4 * small.numel


@pytest.mark.parametrize("declared", ALL, ids=lambda declared: declared.op)
def test_tiny_row_passes_its_gate(declared):
    shape = next(shape for shape in declared.shapes if shape.group == "overhead")
    row = Row(declared, shape, torch.float32)
    verdict = gate.check(row, draw(row, CPU))
    assert not {"wrong", "zeros"} & set(verdict.flags), verdict.notes


def test_goals_name_declared_rows():
    goals, overheads = cases()
    known = {b.op: b for b in ALL}
    for case in goals:
        declared = known[case.op]
        model = [shape for shape in declared.shapes if shape.group == "model"]
        assert case.layout in (None, *(shape.layout for shape in model))
        assert case.dtype in declared.dtypes
        named = [shape for shape in model if set(case.where) <= set(shape.words)]
        assert named, case.name
        assert all(case.phase in Row(declared, shape, case.dtype).phases for shape in named)
        assert case.peer in {peer.name for peer in declared.peers}, case.name
    assert {case.op for case in overheads} <= set(known)


def test_unknown_name_suggests_a_known_one():
    with pytest.raises(ArgumentError, match=r"expected .*rms_norm.*, got rms_nrom"):
        benchmarks("rms_nrom")


def test_padded_sentences_are_fewer_scores_and_pass_their_gate():
    declared = next(b for b in ALL if b.op == "scaled_dot_product_attention")
    padded = Shape("padded", (3, 2, 16, 8), tags=("padded",))
    whole = Shape("whole", (3, 2, 16, 8))
    row = Row(declared, padded, torch.float32)
    arguments = draw(row, CPU)
    seen = arguments["mask"].sum() * 16
    assert arguments["mask"].dtype == torch.bool
    assert arguments["mask"][0].all() and not arguments["mask"].all()
    cost, wider = (declared.cost(shape, torch.float32) for shape in (padded, whole))
    assert cost.forward_flops == 2 * 2 * 2 * 8 * seen < wider.forward_flops
    assert gate.check(row, arguments).flags == []


# Inputs and contestants


def test_inputs_are_the_same_on_every_run_and_of_no_other_row():
    row = _row(_eager)
    other = dataclasses.replace(row, dtype=torch.float64)
    assert torch.equal(draw(row, CPU)["x"], draw(row, CPU)["x"])
    assert not torch.equal(draw(row, CPU)["x"].double(), draw(other, CPU)["x"])


def test_channels_last_inputs_and_gradients():
    shape = Shape("image", (2, 3, 4, 5), layout="channels_last")
    row = Row(dataclasses.replace(_benchmark(_eager), shapes=(shape,)), shape, torch.float32)
    arguments = draw(row, CPU)
    assert arguments["x"].is_contiguous(memory_format=torch.channels_last)
    contestant = Contestant("eager", _eager, arguments, {}, torch.float32)
    grad = contestant.results()["grad x"]
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_written_inputs_are_not_shared():
    benchmark = next(b for b in ALL if b.op == "batch_norm")
    row = Row(benchmark, benchmark.shapes[-1], torch.float32)
    arguments = draw(row, CPU)
    mine = copied(row, arguments)
    mine["running_mean"].add_(1)
    assert not torch.equal(mine["running_mean"], arguments["running_mean"])
    assert mine["x"] is arguments["x"]


def test_memory_counts_the_worst_moment():
    def call():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        second = torch.empty(3 << 20, dtype=torch.uint8)
        return second[:1].clone()

    assert 3 << 20 <= peak_extra(call, CPU) < 4 << 20


# The gate and the flags


def test_gate_passes_a_right_kernel():
    verdict = _check(lambda x: torch.nn.functional.silu(x))
    assert verdict.flags == []
    assert set(verdict.errors) == {"output 0", "grad x"}


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda x: _eager(x) * 1.01, id="output"),
        pytest.param(lambda x: _eager(x) + 0.01 * (x - x.detach()), id="gradient"),
        pytest.param(lambda x: torch.where(x > 2.5, torch.nan, _eager(x)), id="nan"),
    ],
)
def test_gate_rejects_a_wrong_kernel(run):
    assert "wrong" in _check(run).flags


def test_gate_flags_zeros():
    verdict = _check(lambda x: _eager(x) * (torch.arange(x.shape[0]) < 4).unsqueeze(1))
    assert "zeros" in verdict.flags


def test_zeros_that_are_right_are_not_flagged():
    truth = torch.zeros(10)
    assert not gate.mostly_zero(truth, truth)
    assert gate.mostly_zero(truth, torch.ones(10))


def test_gate_flags_a_fallback():
    benchmark = next(b for b in ALL if b.op == "rms_norm")
    row = Row(benchmark, benchmark.shapes[-1], torch.float32)
    assert "torch" in gate.check(row, draw(row, CPU), "torch").flags


def test_no_speed_is_kept_of_a_wrong_kernel():
    row = _row(lambda x: x)
    runner = Runner(Plan([row]), CPU, ONCE)
    for measured in runner.run():
        assert measured.flags
        assert measured.samples == {}
        assert measured.ratio() is None


def test_impossible_speed_is_flagged_by_the_runner():
    row = _row(torch.nn.functional.silu, cost=Cost(1 << 28, 1 << 28))
    found = {m.phase: m for m in Runner(Plan([row]), CPU, ONCE).run()}
    assert all("suspect" in measured.flags for measured in found.values())


def test_row_that_raises_does_not_stop_the_run():
    def broken(x):
        raise RuntimeError("no such kernel\nsecond line")

    rows = [_row(broken), _row(torch.nn.functional.silu)]
    found = list(Runner(Plan(rows), CPU, ONCE).run())
    assert [measured.flags for measured in found[:3]] == [["error"]] * 3
    assert found[0].notes == ["RuntimeError: no such kernel"]
    assert all(measured.samples for measured in found[3:])


def test_runner_measures_every_phase_of_every_contestant():
    row = _row(torch.nn.functional.silu)
    found = {m.phase: m for m in Runner(Plan([row]), CPU, ONCE).run()}
    assert list(found) == ["forward", "backward", "step"]
    for measured in found.values():
        assert set(measured.samples) == {"ours", "eager", "copy"}
        assert all(len(values) == 3 for values in measured.samples.values())
    assert found["step"].memory["eager"] > found["step"].memory["ours"] > 0
    assert found["step"].seconds() > found["backward"].seconds() > 0


def test_op_that_only_reads_is_held_against_a_read():
    row = _row(torch.nn.functional.silu, traffic="read")
    runner = Runner(Plan([row], phases=("step",)), CPU, ONCE)
    (found,) = runner.run()
    assert set(found.samples) == {"ours", "eager", "read"}
    assert found.share == max(found.seconds("read"), found.computing) / found.seconds()
    bandwidth = runner.ceilings.bandwidth(found.bytes // 2)
    assert found.floor == pytest.approx(max(found.bytes / bandwidth.read, found.computing))


def test_op_without_gradients_is_measured_forward_only():
    row = _row(torch.nn.functional.silu, grad=False)
    (found,) = Runner(Plan([row]), CPU, ONCE).run()
    assert found.phase == "forward"
    assert found.counts


def test_further_peer_may_have_other_work():
    dense = Peer("dense (ours)", _eager, cost=lambda shape, dtype: Cost(0, 0, 40, 40))
    row = _row(torch.nn.functional.silu, more=[dense])
    found = {m.phase: m for m in Runner(Plan([row]), CPU, ONCE).run()}
    assert found["step"].peers == ["eager", "dense (ours)"]
    assert found["step"].peer_flops == {"dense (ours)": 80}
    ratio = found["step"].ratio("dense (ours)")[0]
    assert found["step"].speed_ratio("dense (ours)") == pytest.approx(ratio * 12 / 80)


def test_overhead_rows_run_on_one_thread():
    seen = set()

    def run(x):
        seen.add(torch.get_num_threads())
        return torch.nn.functional.silu(x)

    benchmark = _benchmark(run)
    shape = dataclasses.replace(benchmark.shapes[0], group="overhead")
    before = torch.get_num_threads()
    list(Runner(Plan([Row(benchmark, shape, torch.float32)]), CPU, ONCE).run())
    assert seen == {1}
    assert torch.get_num_threads() == before


def test_scaling_measures_one_thread_and_all():
    row = _row(torch.nn.functional.silu)
    found = scaling(Runner(Plan([row]), CPU, ONCE), [row], 2)
    assert set(found[row.id]) == {"1", "2"}


@pytest.mark.parametrize(
    ("rounds", "seconds", "spent"),
    [
        pytest.param(2, 9.0, False, id="too-few"),
        pytest.param(3, 9.0, True, id="slow-rounds"),
        pytest.param(3, 2.0, False, id="below-the-least"),
        pytest.param(5, 2.0, True, id="time-is-up"),
        pytest.param(9, 0.5, False, id="time-is-left"),
        pytest.param(10, 0.5, True, id="most"),
    ],
)
def test_budget(rounds, seconds, spent):
    assert Budget(seconds=1.0, least=5, most=10).spent(rounds, seconds) is spent


def test_rounds_start_with_another_contestant_each():
    order = []
    row = _row(_eager)

    class Recorder(CpuClock):
        def forward(self, contestant, repeats):
            order.append(contestant.name)
            return (1.0,)

    contestants = [
        Contestant(name, _eager, draw(row, CPU), {}, row.dtype) for name in ("a", "b", "c")
    ]
    sample(contestants, "forward", Recorder(), ONCE)
    assert order[-9:] == [*"abc", *"bca", *"cab"]


# Settings


def test_quick_is_a_part_of_full():
    quick, full = (
        {row.id for row in plan(Settings("normalization", full=full, compile=False)).rows}
        for full in (False, True)
    )
    assert quick < full


def test_every_row_can_be_named():
    for row in plan(Settings(full=True, compile=False)).rows:
        named = plan(parse(["--row", f"{row.id}/{row.phases[-1]}", "--no-compile"]))
        assert [found.id for found in named.rows] == [row.id]
        assert named.phases == row.phases[-1:]


def test_selection_by_dtype():
    rows = plan(parse(["rms_norm", "--dtype", "bf16", "--no-compile"])).rows
    assert {row.dtype for row in rows if row.shape.group == "model"} == {torch.bfloat16}


def test_phase_that_a_row_lacks_is_refused(monkeypatch):
    declared = _benchmark(_eager, grad=False)
    monkeypatch.setattr("udlkernels.benchmarks.settings.benchmarks", lambda: [declared])
    named = plan(parse(["--row", "silu/small-32x64/fp32"]))
    assert named.compiled == {("silu/small-32x64/fp32", "forward")}
    with pytest.raises(ArgumentError, match="row: expected an id that the table shows"):
        plan(parse(["--row", "silu/small-32x64/fp32/step"]))


def test_unknown_row_is_refused():
    with pytest.raises(ArgumentError, match="row: expected an id that the table shows"):
        plan(parse(["--row", "rms_norm/none/fp32"]))
