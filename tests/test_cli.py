"""The command line: help, one-line errors, data for scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

import udlkernels
from udlkernels.cli import app, main

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(udlkernels.__file__).parents[1])}
COMMANDS = ["doctor", "bench", "kernels", "explain", "models", "train", "sample"]
runner = CliRunner()


def _invoke(*arguments):
    return runner.invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_help_lists_every_command():
    result = _invoke("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example(command):
    result = _invoke(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"udlkernels {command}" in result.output


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "from udlkernels.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    assert done.returncode == 0


def test_version():
    assert _invoke("--version").output.strip() == udlkernels.__version__


def test_doctor_json():
    result = _invoke("doctor", "--json")
    found = json.loads(result.output)
    assert result.exit_code == 0, found["self_test"]
    assert found["versions"]["torch"]
    assert found["threads"] >= 1
    assert found["instruction_sets"]["active"] in [*found["instruction_sets"]["built"], None]
    tests = found["self_test"]["normalization on cpu"]
    assert tests["wrong"] == {}
    assert any("rms_norm" in ops for ops in tests["through"].values())


def test_doctor_says_what_is_missing(monkeypatch):
    from udlkernels import _library
    from udlkernels.cli import doctor

    monkeypatch.setattr(_library, "extension_error", "it was not built")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    lines = doctor._missing(_library.extension_error)
    assert "C++ kernels: it was not built" in lines
    assert any("triton" in line and "pip install 'udlkernels[gpu]'" in line for line in lines)


def test_doctor_text_names_the_instruction_set():
    result = _invoke("doctor")
    assert result.exit_code == 0
    assert "instruction sets" in result.output
    assert "self-test" in result.output


@pytest.mark.parametrize(
    ("op", "shape"), [("rms_norm", "64x128"), ("group_norm", "2x64x4x4"), ("batch_norm", "4x8x6")]
)
def test_explain_names_the_implementation(op, shape):
    result = _invoke("explain", op, "--shape", shape, "--dtype", "bf16")
    assert result.exit_code == 0
    assert result.output.startswith(f"{op}: ")


def test_explain_hands_options_to_the_op():
    shape = ("explain", "attention", "--shape", "1x2x8x4")
    options = ("--option", "causal=top_left", "--option", "window=3,None")
    assert _invoke(*shape, *options).output.startswith("attention: kernel")
    result = _invoke(*shape, "--option", "window=-1,2")
    assert "window: expected" in str(result.exception)


def test_explain_json_gives_reasons():
    options = ("--shape", "64x128", "--implementation", "torch", "--json")
    choice = json.loads(_invoke("explain", "rms_norm", *options).output)["choices"][0]
    assert choice["implementation"] == "torch"
    assert choice["not_taken"]["kernel"]


BAD = [
    pytest.param(("explain", "rms_norm", "--shape", "4xa"), "[explain] shape", id="shape"),
    pytest.param(("explain", "rms_norm", "--shape", "4", "--dtype", "x"), "dtype", id="dtype"),
    pytest.param(("explain", "rms_nrom", "--shape", "4x4"), "rms_norm", id="op"),
    pytest.param(("explain", "normalization", "--shape", "4x4"), "one op", id="family"),
    pytest.param(
        ("explain", "attention", "--shape", "1x2x8x4", "--option", "causal"),
        "NAME=VALUE",
        id="option",
    ),
    pytest.param(("kernels", "--target", "h100"), "sm_NN", id="target"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_error_is_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.startswith("error: ")
    assert text in error
    assert error.count("\n") == 1


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="4xa"):
        main(["explain", "rms_norm", "--shape", "4xa", "--debug"])


def test_unknown_option_is_a_usage_error():
    result = _invoke("doctor", "--colour")
    assert result.exit_code == 2
    assert "--colour" in result.output


def test_bench_refuses_an_unknown_row(tmp_path):
    command = [sys.executable, "-m", "udlkernels", "bench", "--row", "rms_norm/none/fp32"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: [bench] row: expected an id")
    assert not list(tmp_path.iterdir())
