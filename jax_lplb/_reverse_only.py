"""An identity through which a program can be differentiated once, in reverse mode.

Derivatives that are written by hand have none themselves. Without this, JAX would say so from the inside of such a
function, in words that do not help: of whatever it met first there.
"""

from functools import partial
from typing import Any, NoReturn

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(tree: Any, message: str) -> Any:
    """The tree; what differentiates it in forward mode, or twice, ends in a NotImplementedError with the message."""
    return jax.tree.map(lambda leaf: _forward.bind(leaf, message=message), tree)


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
ad.primitive_jvps[_backward] = partial(_refuse)
