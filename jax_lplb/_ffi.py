"""The compiled handlers: their registration, and calls that choose between them and pure JAX."""

import importlib.util
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
from jax import lax

from jax_lplb import _handlers

Implementation = Literal["ffi", "xla"] | None

MAX_EXPERTS: int = _handlers.max_experts
MAX_GROUP_RANKS: int = _handlers.max_group_ranks
MAX_GROUP_SLOTS: int = _handlers.max_group_slots
MAX_EDGE_RANKS: int = _handlers.max_edge_ranks
MAX_COLOURS: int = _handlers.max_colours


def _runtime_api_version() -> tuple[int, int]:
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0]) for part in ("MAJOR", "MINOR"))
    return major, minor


def _register() -> tuple[frozenset[str], str]:
    """Registers what the running jaxlib accepts; returns the platforms, and why there are no more of them."""
    built, running = tuple(_handlers.ffi_api_version), _runtime_api_version()
    if running < built or running[0] != built[0]:
        # XLA would refuse these handlers, and with them the first JAX call of the whole process.
        return frozenset(), (
            f"jax_lplb was built for XLA FFI API {built[0]}.{built[1]}, and the installed jaxlib has "
            f"{running[0]}.{running[1]}; rebuild jax_lplb, or install a newer jaxlib"
        )
    platforms = _handlers.handlers()
    for platform, targets in platforms.items():
        for target, stages in targets.items():
            jax.ffi.register_ffi_target(target, stages, platform=platform)
    # The platform that handlers call CUDA is cuda where lowerings are chosen.
    names = frozenset(platform.lower() for platform in platforms)
    return names, (
        "" if "cuda" in names else "jax_lplb was built without CUDA handlers; reinstall it where an nvcc is found"
    )


_PLATFORMS, _WHY_NOT = _register()


def handlers() -> frozenset[str]:
    """Platforms, of "cpu" and "cuda", whose compiled handlers are in use; everything else runs pure JAX."""
    return _PLATFORMS


def dispatch(
    name: str,
    implementation: Implementation,
    ffi: Callable[..., Any],
    xla: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Runs `ffi` where the platform that is lowered for has handlers, `xla` elsewhere, or the one asked for."""
    if implementation == "xla":
        return xla(*operands)
    if implementation == "ffi":
        if not _PLATFORMS:
            raise RuntimeError(f"implementation='ffi': custom call lplb_{name} is not registered: {_WHY_NOT}")
        return ffi(*operands)
    if implementation is not None:
        raise ValueError(f"implementation must be None, 'ffi' or 'xla', got {implementation!r}")
    if _WHY_NOT and _cuda_plugin_installed():
        warnings.warn(f"jax_lplb runs as pure JAX on NVIDIA GPUs: {_WHY_NOT}", RuntimeWarning, stacklevel=4)
    return lax.platform_dependent(*operands, default=xla, **dict.fromkeys(sorted(_PLATFORMS), ffi))


def _cuda_plugin_installed() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


class Result(NamedTuple):
    """Shape and dtype of a result, and the operands on whose mesh axes it varies."""

    shape: tuple[int, ...]
    dtype: Any
    varies_with: Iterable[Any]


def varying(*arrays: Any) -> frozenset[str]:
    """Manual mesh axes over which any of the arrays differs between devices (under `check_vma=True`)."""
    return frozenset().union(*(jax.typeof(array).mat.varying for array in arrays))


def vary(array: Any, axes: frozenset[str]) -> Any:
    """The array, typed as varying over these axes too."""
    missing = tuple(sorted(axes - varying(array)))
    return lax.pcast(array, missing, to="varying") if missing else array


def call(target: str, results: list[Result], *operands: Any, **attributes: Any) -> list[jax.Array]:
    """Calls a handler; its results are typed for shard_map's `check_vma`, its batches are vmap's."""
    axes = varying(*operands)

    def struct(result: Result) -> jax.ShapeDtypeStruct:
        own = varying(*result.varies_with)
        if not own:
            return jax.ShapeDtypeStruct(result.shape, result.dtype)
        return jax.ShapeDtypeStruct(
            result.shape,
            result.dtype,
            sharding=jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P()),
            manual_axis_type=jax.sharding.ManualAxisType(varying=own),
        )

    run = jax.ffi.ffi_call(target, [struct(result) for result in results], vmap_method="broadcast_all")
    return list(run(*(vary(operand, axes) for operand in operands), **attributes))
