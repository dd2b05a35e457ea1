"""Builds what is not Python. All of it is optional, and says so where it is left out.

- the CPU kernels: without a C compiler the engine falls back to torch
- the compiled forms of the modules that decide step by step (`penstock/compiled.py`): without mypyc, or with
  PENSTOCK_PURE=1, they run as Python
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCE = ROOT / "src"
GROUP = "penstock"
KERNELS = "penstock.engine._kernels"
# The step loop of replica and twin. Not what crosses the pipe to an engine process and is frozen: mypyc's
# frozen dataclasses cannot be unpickled. Not the policies: anybody may add one, or subclass one, in Python.
COMPILED = (
    "core/events.py",
    "core/step.py",
    "core/units.py",
    "desk/desk.py",
    "desk/drain_rate.py",
    "replica/books.py",
    "replica/draft.py",
    "replica/extents.py",
    "replica/groups.py",
    "replica/host_tier.py",
    "replica/kv_groups.py",
    "replica/kv_pool.py",
    "replica/lane.py",
    "replica/laned.py",
    "replica/pins.py",
    "replica/prefixes.py",
    "replica/replica.py",
    "replica/results.py",
    "replica/sequence.py",
    "replica/swapping.py",
    "replica/waiting.py",
    "twin/closed_loop.py",
    "twin/costs/model.py",
    "twin/costs/operators.py",
    "twin/costs/roofline.py",
    "twin/costs/work.py",
    "twin/executor.py",
    "twin/host_link.py",
    "twin/laned.py",
    "twin/laned_executor.py",
    "twin/replica.py",
    "twin/requests.py",
    "twin/sampling.py",
    "twin/simulate.py",
)


def kernels():
    march = os.environ.get("PENSTOCK_MARCH", "native")
    flags = ["-O3", "-std=gnu11", "-fno-math-errno", "-Wno-psabi"]
    if platform.machine() in ("x86_64", "AMD64", "aarch64") and platform.system() == "Linux":
        flags.append(f"-march={march}")
    return Extension(
        KERNELS,
        ["src/penstock/engine/kernels.c"],
        extra_compile_args=flags,
        libraries=["m"],
        optional=True,
    )


def compiled_modules():
    if os.environ.get("PENSTOCK_PURE", "") not in ("", "0"):
        return []
    try:
        from mypyc.build import mypycify
    except ImportError:
        print("penstock: mypyc is not installed; decisions run as Python", file=sys.stderr)
        return []
    os.chdir(SOURCE)  # mypy names modules by their path from here
    try:
        extensions = mypycify(
            ["--config-file", "../pyproject.toml", *(f"penstock/{file}" for file in COMPILED)],
            opt_level="3",
            debug_level="0",
            group_name=GROUP,
            target_dir=str(ROOT / "build"),
        )
    except SystemExit:
        print("penstock: mypyc refused the sources; decisions run as Python", file=sys.stderr)
        return []
    finally:
        os.chdir(ROOT)
    for extension in extensions:
        extension.optional = True
    return extensions


class BuildFast(build_ext):
    """Puts compiled modules into `penstock/_fast`, under their dotted names, and writes the index."""

    def copy_extensions_to_source(self):
        everything = self.extensions
        self.extensions = [extension for extension in everything if extension.name == KERNELS]
        super().copy_extensions_to_source()
        self.extensions = everything

    def run(self):
        super().run()
        names = [extension.name for extension in self.extensions if extension.name != KERNELS]
        built = {name: Path(self.build_lib) / self.get_ext_filename(name) for name in names}
        if not names or not all(path.exists() for path in built.values()):
            return
        folder = (SOURCE if self.inplace else Path(self.build_lib)) / "penstock" / "_fast"
        folder.mkdir(exist_ok=True)
        modules = {name: name + sysconfig.get_config_var("EXT_SUFFIX") for name in names}
        for name, path in built.items():
            shutil.copy(path, folder / modules[name])
            if not self.inplace:
                path.unlink()  # beside its source it would be found even when the source has changed
        index = {
            "python": sys.implementation.cache_tag,
            "sources": {file: digest_of(SOURCE / "penstock" / file) for file in COMPILED},
            "modules": modules,
        }
        (folder / "index.json").write_text(json.dumps(index, indent=1))


def digest_of(source):
    """As `penstock/compiled.py` checks it; the package itself cannot be imported while it is built."""
    return hashlib.blake2b(source.read_bytes(), digest_size=16).hexdigest()


setup(ext_modules=[kernels(), *compiled_modules()], cmdclass={"build_ext": BuildFast})
