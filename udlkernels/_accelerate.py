"""`accelerate`: our modules in place of torch's in a model that already exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from udlkernels import nn

_FORMS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)
}
_ORIGINALS = {ours: theirs for theirs, ours in _FORMS.items()}


def accelerate(model: torch.nn.Module) -> torch.nn.Module:
    """Turns every torch.nn module of `model` that has a form in `udlkernels.nn` into that form.

    Modules keep their identity, parameters, buffers, hooks and `state_dict`; only the class
    changes, so optimizers and checkpoints hold. Subclasses of torch's modules are left alone: they
    may compute something else.

    Args:
        model: changed in place.

    Returns:
        The same model.
    """
    return _replace(model, _FORMS)


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undoes `accelerate`, in place; returns the same model."""
    return _replace(model, _ORIGINALS)


@contextlib.contextmanager
def accelerated(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`accelerate(model)` inside the `with` block, the model as it was after it."""
    before = {module: type(module) for module in model.modules()}
    try:
        yield accelerate(model)
    finally:
        for module, original in before.items():
            module.__class__ = original


def _replace(
    model: torch.nn.Module, forms: dict[type[torch.nn.Module], type[torch.nn.Module]]
) -> torch.nn.Module:
    for module in model.modules():
        form = forms.get(type(module))
        if form is not None:
            module.__class__ = form
    return model
