"""Files that appear whole or not at all, and the state that a run is resumed from."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from udlkernels._errors import ArgumentError

FORMAT = "udlkernels training 1"


def write(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside `path` and move it there, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            save(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any]) -> None:
    write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def unusable(path: Path, expected: str, command: str = "train") -> ArgumentError:
    return ArgumentError(command, "resume" if command == "train" else "checkpoint", expected, path)


def load(path: Path, command: str = "train") -> dict[str, Any]:
    """Read what `save` wrote; tensors and plain values only, so that no file can run code."""
    unreadable = (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (*unreadable, pickle.UnpicklingError) as error:
        raise unusable(path, "a checkpoint that can be read", command) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise unusable(path, "a checkpoint written by `udlkernels train`", command)
    return state


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global generator that a model may draw from."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"]
    numpy_state["state"]["key"] = torch.from_numpy(key.astype(np.int64))
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    key = inner["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": key}})
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
