"""Loads as integers, which sums and divisions leave exact; and which replicas there are to share them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Unit(NamedTuple):
    """Of float loads as integers: 2**-coarse_bits * 2**-more_bits * 2**exponent, whose product may be subnormal."""

    coarse_bits: int
    more_bits: jax.Array
    exponent: jax.Array


def to_integers(load: jax.Array) -> tuple[jax.Array, Unit | None]:
    """Loads as int32; float loads in the finest power of two in which they sum to at most 2**30, but for rounding."""
    if load.dtype == jnp.int32:
        return load, None
    most = jnp.max(load, initial=0, where=load > 0)
    # Powers of two scale exactly, so that neither the order of a sum nor a division shows in the result. Beyond these
    # bounds they, or the ranks' loads, would leave float32's range.
    exponent = jnp.clip(exponent_of(most) + 1, -125, 115)  # most < 2**exponent
    coarse_bits = 30 - (load.shape[0] - 1).bit_length()  # if all loads were the largest
    coarse = jnp.minimum(load * power_of_two(-exponent), 1) * 2.0**coarse_bits
    total = jnp.sum(_rounded(coarse), dtype=jnp.int32)
    more_bits = jnp.maximum(lax.clz(total) - 2, 0)
    return _rounded(coarse * power_of_two(more_bits)), Unit(coarse_bits, more_bits, exponent)


def _rounded(load: jax.Array) -> jax.Array:
    """To int32; what is negative or NaN counts as 0."""
    return jnp.where(load > 0, jnp.rint(load), 0).astype(jnp.int32)


def in_tokens(rank_load: jax.Array, unit: Unit | None) -> jax.Array:
    """Rank loads of `to_integers`' loads, in the unit of those it was given."""
    if unit is None:
        return rank_load
    return rank_load * 2.0**-unit.coarse_bits * power_of_two(-unit.more_bits) * power_of_two(unit.exponent)


def in_units(tokens: int, unit: Unit | None) -> jax.Array:
    """A number of tokens beside `to_integers`' loads, int32 []."""
    if unit is None:
        return jnp.int32(min(tokens, 2**31 - 1))
    whole = float(min(tokens, 2**127))  # as float32 holds
    scaled = whole * power_of_two(-unit.exponent) * 2.0**unit.coarse_bits * power_of_two(unit.more_bits)
    return jnp.minimum(scaled, 2.0**30).astype(jnp.int32)  # all loads together are not more


def exponent_of(value: jax.Array) -> jax.Array:
    """int32, of the power of two that is next below positive float32 values, from 2**-126 on; 128 of infinity."""
    return (lax.bitcast_convert_type(value, jnp.int32) >> 23) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """float32, of int32 exponents from -126 on."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def present(log2phy: jax.Array, num_physical: int) -> jax.Array:
    """Which entries are replicas: the leading ones of a row that are slots."""
    return jnp.cumprod((log2phy >= 0) & (log2phy < num_physical), axis=1, dtype=jnp.int32) > 0
