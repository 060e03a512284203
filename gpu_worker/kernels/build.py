"""Compiles the CPU kernels, at installation or by hand: `python -m gpu_worker.kernels.build`.

It needs a C++20 compiler that knows AVX-512 and AMX (GCC 12, Clang 16, or the one in the package
`ziglang`), and is only tried on x86-64 Linux. Without the library the engine runs on torch's own
operations. Nothing but the standard library is imported: the installer has nothing else.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
LIBRARY_NAME = "libforebay_kernels.so"

_COMMON = shlex.split(
    "-std=c++20 -O3 -fPIC -pthread -fno-exceptions -fno-rtti -fno-threadsafe-statics "
    "-ffp-contract=off -Wall -Wextra "
    "-Wno-maybe-uninitialized -Wno-uninitialized"  # GCC 12 warns of its own headers
)
_LINK = shlex.split("-shared -pthread -nodefaultlibs -lc -lm")
_AVX512 = shlex.split("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c")
_AMX = shlex.split("-mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16")
_FLAGS_BY_SUFFIX = {
    "_avx512": _AVX512,
    "_amx": [*_AVX512, *_AMX],
}
_MAX_ERRORS = 20


class BuildError(Exception):
    """No compiler could build the library; the message says what each of them said."""


def is_supported_platform() -> bool:
    """Whether there are kernels for this machine's processor and system."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def source_digest() -> str:
    """Names the sources' contents, so that a library built from others is noticed."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compilers() -> Iterator[list[str]]:
    """Commands to try, best first."""
    if os.environ.get("CXX"):
        yield shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        path = shutil.which(name)
        if path is not None:
            yield [path]
    yield [sys.executable, "-m", "ziglang", "c++"]


def build(target: Path) -> list[str]:
    """Write the library to `target` and return the compiler that did. Raises BuildError."""
    if not is_supported_platform():
        raise BuildError(f"there are no kernels for {platform.machine()} on {sys.platform}")
    complaints = []
    for compiler in compilers():
        try:
            _build_with(compiler, target)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).splitlines()
            errors = [line for line in lines if "rror" in line] or lines
            complaints.append("\n".join((f"{' '.join(compiler)}:", *errors[:_MAX_ERRORS])))
        else:
            return compiler
    raise BuildError("\n".join(complaints))


def _build_with(compiler: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]

        def compile_one(source: Path, compiled: Path) -> None:
            flags = [f'-DFB_SOURCE_DIGEST="{source_digest()}"', *_COMMON, *_flags(source)]
            _run([*compiler, *flags, "-c", str(source), "-o", str(compiled)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        linked = Path(scratch) / LIBRARY_NAME
        _run([*compiler, *map(str, objects), *_LINK, "-o", str(linked)])
        target.parent.mkdir(parents=True, exist_ok=True)
        # In one step: a process that has the old library mapped keeps it whole.
        fresh = target.with_suffix(".new")
        shutil.copyfile(linked, fresh)
        fresh.replace(target)


def _flags(source: Path) -> list[str]:
    for suffix, flags in _FLAGS_BY_SUFFIX.items():
        if source.stem.endswith(suffix):
            return flags
    return []


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> int:
    """Build into the package's own directory."""
    target = Path(__file__).resolve().parent / LIBRARY_NAME
    try:
        compiler = build(target)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{target.name}: built by {' '.join(compiler)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
