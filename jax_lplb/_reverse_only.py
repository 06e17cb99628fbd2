"""Marks of what can be differentiated once, in reverse mode.

Derivatives that are written by hand have none themselves. Without this, JAX would say so from the inside of such a
function, of whatever it met first there, and not what to do.
"""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(tree: Any, message: str) -> Any:
    """The tree; to differentiate it in forward mode, or twice, is a NotImplementedError with the message."""

    def marked(leaf: Any) -> Any:
        return _forward.bind(leaf, message=message) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(marked, tree)


def _identity(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(lambda x, message: x)
    primitive.def_abstract_eval(lambda x, message: x)
    mlir.register_lowering(primitive, lambda ctx, x, message: [x])
    batching.primitive_batchers[primitive] = lambda args, axes, message: (primitive.bind(*args, message=message), *axes)
    return primitive


def _refuse(*_: Any, message: str) -> NoReturn:
    raise NotImplementedError(message)


_forward, _differentiated, _tangent = map(_identity, ("lplb_reverse_only", "lplb_differentiated", "lplb_tangent"))


def _forward_jvp(primals: Any, tangents: Any, message: str) -> tuple[Any, Any]:
    (primal,), (tangent,) = primals, tangents
    if not isinstance(tangent, ad.Zero):
        tangent = _tangent.bind(tangent, message=message)
    return _differentiated.bind(primal, message=message), tangent


def _transpose(cotangent: Any, _: Any, message: str) -> list[Any]:
    return [cotangent if isinstance(cotangent, ad.Zero) else _differentiated.bind(cotangent, message=message)]


ad.primitive_jvps[_forward] = _forward_jvp
ad.primitive_jvps[_differentiated] = lambda primals, tangents, message: _refuse(message=message)
# In reverse mode tangents are transposed, and only in forward mode computed.
ad.deflinear2(_tangent, _transpose)
_tangent.def_impl(_refuse)
mlir.register_lowering(_tangent, lambda ctx, x, message: _refuse(message=message))
