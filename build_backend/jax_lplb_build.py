"""scikit-build-core, and nvcc from PyPI where CUDA handlers are asked for on a machine without one.

JAX_LPLB_CUDA=1 builds the CUDA handlers or fails, JAX_LPLB_CUDA=0 leaves them out, and without the variable they are
built where an nvcc is found. JAX_LPLB_MATHDX="8;32" has the solve of groups of such sizes use NVIDIA cuSolverDx.
pyproject.toml hands the variables on to CMake; here they only decide on requirements.
"""

import os
import shutil

import scikit_build_core.build as _base
from scikit_build_core.build import *  # noqa: F403

# One release of the compiler and of its parts: they fit each other only as a set.
_NVCC_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
# libmathdx generates cuSolverDx functions with NVRTC, and nvJitLink links them; only at build time.
_MATHDX_WHEELS = ["nvidia-libmathdx-cu13==0.4.1.15", "nvidia-cuda-nvrtc==13.0.88", "nvidia-nvjitlink==13.0.88"]


def _has_nvcc():
    """Whether CMakeLists.txt will find an nvcc outside of Python's folders."""
    if os.environ.get("CUDACXX"):
        return True
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(root, "bin") for root in roots if root]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)])) is not None


def _nvcc_wheels():
    return _NVCC_WHEELS if os.environ.get("JAX_LPLB_CUDA") == "1" and not _has_nvcc() else []


def _mathdx_wheels():
    return [] if os.environ.get("JAX_LPLB_MATHDX", "OFF").upper() in ("", "0", "OFF") else _MATHDX_WHEELS


def get_requires_for_build_wheel(config_settings=None):
    return _base.get_requires_for_build_wheel(config_settings) + _nvcc_wheels() + _mathdx_wheels()


def get_requires_for_build_editable(config_settings=None):
    return _base.get_requires_for_build_editable(config_settings) + _nvcc_wheels() + _mathdx_wheels()
