"""PEP 517 and 660 build backend: setuptools, and torch only when no headers are found.

pip builds in an environment of its own. The torch of the environment that is installed into is
found from there, so that a torch already present is never downloaded a second time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import build_meta
from toolchain import find_toolchain
from torch_headers import REQUIREMENT, find_torch

build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_editable = build_meta.build_editable

Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return torch_requirement() + build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return torch_requirement() + build_meta.get_requires_for_build_editable(config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    # setuptools would also pack what an earlier build left here and the sources no longer have.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def torch_requirement() -> list[str]:
    if os.environ.get("UDLKERNELS_NO_EXTENSION") == "1":
        return []
    find_toolchain()  # reports a missing compiler before torch is downloaded
    return [] if find_torch() else [REQUIREMENT]
