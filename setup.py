"""Builds the CPU kernels. Optional: without a C compiler the engine falls back to torch, and says so."""

import os
import platform

from setuptools import Extension, setup

MARCH = os.environ.get("PENSTOCK_MARCH", "native")
flags = ["-O3", "-std=gnu11", "-fno-math-errno", "-Wno-psabi"]
if platform.machine() in ("x86_64", "AMD64", "aarch64") and platform.system() == "Linux":
    flags.append(f"-march={MARCH}")

setup(
    ext_modules=[
        Extension(
            "penstock.engine._kernels",
            ["src/penstock/engine/kernels.c"],
            extra_compile_args=flags,
            libraries=["m"],
            optional=True,
        )
    ]
)
