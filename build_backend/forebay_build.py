"""Setuptools' build backend, with a compiler from PyPI where the machine has none.

The package `ziglang` carries a whole C++ compiler; it is fetched only if no other that is new
enough is on the PATH, and only for the time of the build.
"""

import os
import platform
import shutil
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401, the rest of the backend is setuptools' own
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

_COMPILER_PACKAGE = "ziglang>=0.13"


def get_requires_for_build_wheel(config_settings=None):
    """What setuptools needs, and a compiler if there is none."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler()


def get_requires_for_build_editable(config_settings=None):
    """What setuptools needs, and a compiler if there is none."""
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler()


def _compiler():
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return []  # there are no kernels to compile
    if os.environ.get("CXX") or any(map(_suits, ("g++", "clang++", "c++"))):
        return []
    return [_COMPILER_PACKAGE]


def _suits(name):
    """Whether this is a compiler that knows the processors that the kernels are for."""
    path = shutil.which(name)
    if path is None:
        return False
    options = ["-std=c++20", "-mamx-int8", "-mavx512bf16", "-mavx512vnni"]
    preprocess = [path, *options, "-E", "-x", "c++", os.devnull]
    return subprocess.run(preprocess, capture_output=True, check=False).returncode == 0
