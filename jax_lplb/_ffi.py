"""The compiled handlers: their registration, and calls that choose between them and pure JAX."""

import functools
import importlib.util
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_lplb import _handlers

Implementation = Literal["ffi", "xla"] | None

MAX_EXPERTS: int = _handlers.max_experts
MAX_GROUP_RANKS: int = _handlers.max_group_ranks
MAX_GROUP_SLOTS: int = _handlers.max_group_slots
MAX_NEAR_SLOTS: int = _handlers.max_near_slots
MAX_EDGE_RANKS: int = _handlers.max_edge_ranks
MAX_COLOURS: int = _handlers.max_colours
shares_rows = _handlers.shares_rows


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

# Names of all custom calls, for `jax.export`, which asks for each whether it may be in a program that is kept. It may:
# what runs the program has to import the jax_lplb that wrote it.
CUSTOM_CALLS: tuple[str, ...] = tuple(
    sorted({"lplb_gather"}.union(*_handlers.handlers().values())) if _PLATFORMS else ()
)


@functools.cache
def gpus() -> tuple[int, ...]:
    """What CUDA calls the GPUs that JAX uses in this process; none where there are none. Registers `lplb_gather`."""
    try:
        found = jax.local_devices(backend="cuda")
    except RuntimeError:
        return ()
    register_gather()
    return tuple(int(gpu.local_hardware_id) for gpu in found)


def register_gather() -> None:
    """Registers `lplb_gather`, once.

    XLA must know the type of what that call keeps before it knows its handlers; what is registered before there is a
    backend is queued, in an order that differs between releases.
    """
    stages, state = _handlers.gather_cuda()
    jax.ffi.register_ffi_type("lplb_gather", state, platform="CUDA")
    jax.ffi.register_ffi_target("lplb_gather", stages, platform="CUDA")


def handlers() -> frozenset[str]:
    """Platforms, of "cpu" and "cuda", whose compiled handlers are in use; everything else runs pure JAX."""
    return _PLATFORMS


def why_no_handlers(platform: str) -> str:
    """Why no handlers are in use on a platform; empty where they are."""
    if platform in _PLATFORMS:
        return ""
    return _WHY_NOT if platform == "cuda" or not _PLATFORMS else f"jax_lplb has no handlers for {platform}"


def choose(
    name: str,
    implementation: Implementation,
    ffi: Callable[..., Any],
    xla: Callable[..., Any],
    *operands: Any,
    platforms: frozenset[str] | None = None,
) -> Any:
    """Runs `ffi` where the program is lowered for one of `platforms`, `xla` elsewhere, or the one asked for.

    `platforms`: by default all that have handlers.
    """
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
    names = sorted(_PLATFORMS if platforms is None else platforms)
    return lax.platform_dependent(*operands, default=xla, **dict.fromkeys(names, ffi))


def _cuda_plugin_installed() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


class Result(NamedTuple):
    """Shape and dtype of a result, and the operands on whose mesh axes it varies, but for those of `same_over`."""

    shape: tuple[int, ...]
    dtype: Any
    varies_with: Iterable[Any]
    same_over: frozenset[str] = frozenset()


def varying(*arrays: Any) -> frozenset[str]:
    """Manual mesh axes over which any of the arrays differs between devices (under `check_vma=True`)."""
    return frozenset().union(*(jax.typeof(array).mat.varying for array in arrays))


def vary(array: Any, axes: frozenset[str]) -> Any:
    """The array, typed as varying over these axes too."""
    missing = tuple(sorted(axes - varying(array)))
    return lax.pcast(array, missing, to="varying") if missing else array


def call(
    target: str, results: list[Result], *operands: Any, aliases: dict[int, int] | None = None, **attributes: Any
) -> list[jax.Array]:
    """Calls a handler; its results are typed for shard_map's `check_vma`, its batches are vmap's.

    `aliases`: by the number of an operand, that of the result in its place. A call with aliases, be they none, has an
    effect on memory. XLA is told, so that it does the call where it stands, and once. JAX is not: it may drop the call
    together with all that hangs on it.
    """
    axes = varying(*operands)
    operands = tuple(vary(operand, axes) for operand in operands)
    kinds = tuple(
        (result.shape, jnp.dtype(result.dtype), varying(*result.varies_with) - result.same_over) for result in results
    )
    if aliases is None:
        run = jax.ffi.ffi_call(target, list(map(_struct, kinds)), vmap_method="broadcast_all")
        return list(run(*operands, **attributes))
    pairs, named = tuple(aliases.items()), tuple(attributes.items())
    return list(_in_place.bind(*operands, target=target, kinds=kinds, aliases=pairs, attributes=named))


_Kind = tuple[tuple[int, ...], Any, frozenset[str]]  # shape, dtype and varying axes of a result


def _struct(kind: _Kind) -> jax.ShapeDtypeStruct:
    shape, dtype, axes = kind
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(
        shape,
        dtype,
        sharding=jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P()),
        manual_axis_type=jax.sharding.ManualAxisType(varying=axes),
    )


# `jax.ffi.ffi_call` would tell JAX of the effect too, which then keeps calls whose results nobody uses, as those that a
# rematerialised backward pass does not need.
_in_place = Primitive("lplb_in_place")
_in_place.multiple_results = True


@_in_place.def_abstract_eval
def _in_place_abstract_eval(*_: Any, target: str, kinds: tuple[_Kind, ...], **__: Any) -> Any:
    return jax.make_jaxpr(jax.ffi.ffi_call(target, list(map(_struct, kinds))))().out_avals


def _in_place_lowering(ctx: Any, *operands: Any, target: str, aliases: Any, attributes: Any, **_: Any) -> Any:
    lower = jax.ffi.ffi_lowering(target, has_side_effect=True, operand_output_aliases=dict(aliases))
    # JAX compares the parameters of operations, which arrays do not stand: theirs are tuples.
    arrays = {name: np.array(value, np.int32) for name, value in attributes if isinstance(value, tuple)}
    return lower(ctx, *operands, **dict(attributes) | arrays)


def _in_place_batched(operands: Any, axes: Any, *, kinds: tuple[_Kind, ...], **parameters: Any) -> Any:
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    operands = [
        lax.broadcast(operand, (size,)) if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    ]
    kinds = tuple(((size, *shape), dtype, varies) for shape, dtype, varies in kinds)
    results = _in_place.bind(*operands, kinds=kinds, **parameters)
    return results, [0] * len(results)


mlir.register_lowering(_in_place, _in_place_lowering)
batching.primitive_batchers[_in_place] = _in_place_batched
