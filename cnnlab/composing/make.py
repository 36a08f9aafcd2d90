"""Makes parts from their config nodes.

The rules are Hydra's (`_target_`, `_partial_`, nested nodes), the call is ours: `hydra.utils.instantiate`
would copy the wired modules and tensors through a config, and from Hydra 1.4 on it wants a whitelist.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from cnnlab.composing.kinds import LISTS, MAPPINGS, inside, is_part, kinds_of
from cnnlab.composing.signature import RESERVED, accepts, locate, parameters_of
from cnnlab.composing.values import converted
from cnnlab.errors import UsageError, short


def make(node: Mapping[str, Any] | None, **wired: Any) -> Any:
    """The part that `node` names, with those of the `wired` parameters that its constructor takes.

    `None` for no node, or one whose `_target_` is null: the choice is then the model's own. Nested nodes are made
    where an annotation asks for a part. Raises `UsageError` for one that stands elsewhere.
    """
    if node is None or node.get("_target_") is None:
        return None
    target = locate(str(node["_target_"]))
    values = {key: value for key, value in node.items() if key not in RESERVED}
    _, hints = parameters_of(target)
    given = {key: _made(value, hints.get(key)) for key, value in converted(target, values).items()}
    given |= {key: value for key, value in wired.items() if key not in given and accepts(target, key)}
    return partial(target, **given) if node.get("_partial_", False) else target(**given)


def _made(value: Any, hint: Any) -> Any:
    if is_part(value):
        if not kinds_of(hint):  # a config that was not checked
            raise UsageError(f"`_target_={short(str(value['_target_']))}`: no part may stand there")
        return make(value)
    if isinstance(value, Mapping):
        return {key: _made(item, inside(hint, MAPPINGS)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_made(item, inside(hint, (*LISTS, tuple))) for item in value)
    return value
