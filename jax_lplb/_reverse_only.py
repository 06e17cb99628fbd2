"""Functions that can be differentiated once, in reverse mode.

Derivatives that are written by hand have none themselves. Without this, JAX would say so from the inside of such a
function, of whatever it met first there, and not what to do.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(function: Callable[..., Any], message: str, *operands: Any) -> Any:
    """function(*operands); to differentiate it in forward mode, or twice, is a NotImplementedError with the message."""
    try:
        return function(*jax.tree.map(lambda leaf: _marked(leaf, message), operands))
    except TypeError as error:
        # Where tangents are traced before they are computed, JAX may come first.
        if "forward-mode" in str(error) and "custom_vjp" in str(error):
            raise NotImplementedError(message) from error
        raise


def _marked(leaf: Any, message: str) -> Any:
    return _forward.bind(leaf, message=message) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def _identity(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(lambda x, message: x)
    primitive.def_abstract_eval(lambda x, message: x)
    mlir.register_lowering(primitive, lambda ctx, x, message: [x])
    batching.primitive_batchers[primitive] = lambda args, axes, message: (primitive.bind(*args, message=message), *axes)
    return primitive


def _refuse(*_: Any, message: str) -> NoReturn:
    raise NotImplementedError(message)


_forward, _tangent, _backward = map(_identity, ("lplb_reverse_only", "lplb_tangent", "lplb_cotangent"))
# In reverse mode tangents are transposed, and only in forward mode computed.
ad.primitive_jvps[_forward] = lambda primals, tangents, message: (
    _forward.bind(*primals, message=message),
    tangents[0] if isinstance(tangents[0], ad.Zero) else _tangent.bind(*tangents, message=message),
)
_tangent.def_impl(_refuse)
mlir.register_lowering(_tangent, lambda ctx, x, message: _refuse(message=message))
ad.deflinear2(
    _tangent,
    lambda cotangent, _, message: [
        cotangent if isinstance(cotangent, ad.Zero) else _backward.bind(cotangent, message=message)
    ],
)
ad.primitive_jvps[_backward] = lambda primals, tangents, message: _refuse(message=message)
