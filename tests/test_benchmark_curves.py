"""How the benchmark suite fits and shows what grows with the length."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import pytest
import torch

from udlkernels import functional, testing
from udlkernels._errors import ArgumentError
from udlkernels.benchmarks import curve, curves, settings, suite
from udlkernels.benchmarks.attention.curve import CURVE, in_blocks
from udlkernels.benchmarks.results import Measured

SMALL = dataclasses.replace(CURVE, lengths=(8, 16, 32))


def _measured(length, seconds, memory, phase="step", **changes):
    row = Measured(
        id=f"attention/{length}/fp32/{phase}",
        op="attention",
        shape=CURVE.declared(length).shapes[0].id,
        group="model",
        layout="contiguous",
        dtype="fp32",
        phase=phase,
        threads=1,
        bytes=1,
        flops=1,
        samples={"ours": [seconds], "eager": [2 * seconds], "copy": [1e-9]},
        memory={"ours": memory, "eager": memory**2},
    )
    return dataclasses.replace(row, **changes)


def _grown(power, *, linear=True):
    return [_measured(n, n**power / 1e6, 300 * n if linear else n**2) for n in SMALL.lengths]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 2.5])
def test_exponent_of_a_power_is_found(power):
    found = curve.exponent({length: 7 * length**power for length in (1024, 2048, 8192)})
    assert found == pytest.approx(power)


def test_exponent_wants_two_lengths():
    assert math.isnan(curve.exponent({1024: 1.0}))


def test_every_contestant_has_its_fit():
    found = {fit.contestant: fit for fit in curve.fits(SMALL, _grown(2.0))}
    assert [found[name].time for name in found] == pytest.approx([2.0, 2.0])
    assert found["ours"].memory == pytest.approx(1.0)
    assert found["eager"].memory == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        pytest.param(_grown(2.0), [True, True], id="both"),
        pytest.param(_grown(2.1), [False, True], id="time-grows-faster"),
        pytest.param(_grown(2.0, linear=False), [True, False], id="memory-grows-faster"),
        pytest.param(_grown(2.0)[:1], [False, False], id="one-length"),
        pytest.param(
            [*_grown(2.0)[:2], _measured(32, 1.0, 1, flags=["wrong"])], [False, False], id="wrong"
        ),
        pytest.param([_measured(8, 1.0, 1, flags=["error"])], [False, False], id="none-counts"),
    ],
)
def test_goals_of_growth(rows, met):
    assert [outcome.passed for outcome in curve.outcomes(SMALL, rows)] == met


def test_table_shows_a_row_that_does_not_count(capsys):
    curve.show(SMALL, [*_grown(2.0), _measured(8, 1.0, 1, "forward", flags=["wrong"])])
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if "T 8 fp32 forward" in line)
    assert "wrong" in line
    assert "2.00x" not in line
    line = next(line for line in lines if "T 16 fp32 step" in line)
    assert "2.00x" in line
    assert " 300 " in line


def test_formula_in_blocks_is_the_formula():
    whole = functools.partial(functional.attention, causal="top_left", implementation="reference")
    blocks = functools.partial(in_blocks, rows=5)
    testing.compare(blocks, whole, [], [torch.randn(1, 2, 23, 8) for _ in range(3)], reduction=39)


def test_run_measures_writes_and_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "curves", lambda selection: [SMALL])
    wanted = ["attention", "--curve", "--dtype", "fp32", "--out", str(tmp_path)]
    assert suite.run(settings.parse(wanted)) == 0
    written = json.loads((tmp_path / "curve-attention.json").read_text())
    assert [row["shape"] for row in written["rows"][::2]] == [
        f"curve-1x2x{length}x64" for length in SMALL.lengths
    ]
    assert {row["phase"] for row in written["rows"]} == {"forward", "step"}
    assert all(not {"wrong", "zeros", "error"} & set(row["flags"]) for row in written["rows"])
    for row in written["rows"]:
        assert set(row["samples"]) == set(row["memory"]) | {"copy"} == {
            "ours", "eager", "math", "copy",
        }  # fmt: skip
    assert len(written["cases"]) == 4
    shown = capsys.readouterr().out
    assert "T 32 fp32 step" in shown
    assert "exponent of the peak extra memory" in shown


def test_picture_has_a_line_for_each_contestant(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [*_grown(2.0), *(_measured(n, n**2, n, "forward") for n in SMALL.lengths)]
    assert curve.draw(SMALL, rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    assert not curve.draw(SMALL, [], tmp_path / "none.png")


def test_plain_path_ends_where_memory_would():
    assert [peer.name for peer in CURVE.declared(4096).peers] == ["eager", "math"]
    assert [peer.name for peer in CURVE.declared(8192).peers] == ["eager"]


def test_unknown_curve_names_the_known():
    assert curves("attention") == [CURVE]
    with pytest.raises(ArgumentError, match="curve: expected attention, got rms_norm"):
        curves("rms_norm")
