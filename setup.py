"""Adds the CPU kernels, compiled where a compiler is found, to what pyproject.toml describes."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import copyfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# By its path: at this moment the packages around it cannot be imported.
spec = spec_from_file_location("kernels_build", "gpu_worker/kernels/build.py")
assert spec is not None
assert spec.loader is not None
kernels = module_from_spec(spec)
spec.loader.exec_module(kernels)


class BuildKernels(build_ext):
    """Builds a plain shared library: it is loaded with ctypes and knows nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library goes in the tree of packages."""
        return str(Path(*fullname.split(".")[:-1]) / kernels.LIBRARY_NAME)

    def build_extension(self, ext: Extension) -> None:
        """Build the library; without it, the engine uses torch's operations, and says so."""
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        try:
            kernels.build(target)
        except kernels.BuildError as error:
            print(f"the CPU kernels are left out: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """What was built."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """An editable installation has the library in the source tree."""
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            built = Path(self.build_lib) / name
            if built.exists():
                fresh = Path(name).with_suffix(".new")
                copyfile(built, fresh)
                fresh.replace(name)


setup(
    ext_modules=[Extension("gpu_worker.kernels.libforebay_kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
