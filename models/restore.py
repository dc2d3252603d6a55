"""Networks back from the checkpoints that `udlkernels train` left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from udlkernels._errors import ArgumentError

from . import checkpoint, load
from .task import Task


@dataclasses.dataclass(frozen=True)
class Trained:
    task: Task[Any]
    path: Path
    network: nn.Module
    vocabulary: str

    def sample(self, prompt: str, tokens: int, **options: Any) -> Iterator[str]:
        """Text that goes on from the prompt, a piece for each token."""
        assert self.task.sample is not None  # `restore` looked
        return self.task.sample(self.network, self.vocabulary, prompt, tokens, **options)


def restore(model: str, place: Path) -> Trained:
    """A trained model of text.

    Args:
        place: a checkpoint, or the output folder of a run: then the latest of its checkpoints,
            trained with our ops where there are any.

    Raises:
        ArgumentError: a model that writes no text, or none that is trained.
    """
    task = load(model)
    if task.sample is None:
        raise ArgumentError("sample", "model", "a model of text (ch12_transformer_decoder)", model)
    path = place if place.is_file() else _latest(model, place)
    state = checkpoint.load(path, "sample")
    identity, unfit = state.get("identity"), f"a checkpoint of {model}"
    if not isinstance(identity, dict) or identity.get("model") != task.name:
        raise checkpoint.unusable(path, unfit, "sample")
    config = next(iter(task.variants.values()))
    known = {field.name for field in dataclasses.fields(config)}
    try:
        changes = {name: value for name, value in identity.items() if name in known}
        network = task.build(dataclasses.replace(config, **changes))
        network.load_state_dict(state["model"])
        vocabulary = state["vocabulary"]
    except (KeyError, TypeError, RuntimeError) as error:
        raise checkpoint.unusable(path, f"{unfit} in this version", "sample") from error
    return Trained(task, path, network.eval(), vocabulary)


def _latest(model: str, folder: Path) -> Path:
    found = [*folder.glob("checkpoints/*.pt"), *folder.glob("*.pt")]
    if not found:
        out = "" if folder == Path("runs") / model else f" --out {folder}"
        expected = f"a trained model (first run: udlkernels train {model}{out})"
        raise ArgumentError("sample", "checkpoint", expected, f"no checkpoint in {folder}")
    return max(found, key=lambda path: ("-udlkernels-" in path.name, path.stat().st_mtime))
