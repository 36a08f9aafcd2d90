"""Makes parts from their config nodes.

The rules are Hydra's (`_target_`, `_partial_`, nested nodes), the call is ours: `hydra.utils.instantiate`
would copy the wired modules and tensors through a config, and from Hydra 1.4 on it wants a whitelist.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from cnnlab.check import RESERVED, accepts, converted, is_part, locate


def make(node: Mapping[str, Any] | None, **wired: Any) -> Any:
    """The part that `node` names, with those of the `wired` parameters that its constructor takes.

    `None` for no node, or one whose `_target_` is null: the choice is then the model's own.
    """
    if node is None or node.get("_target_") is None:
        return None
    target = locate(str(node["_target_"]))
    values = {key: value for key, value in node.items() if key not in RESERVED}
    given = {key: _made(value) for key, value in converted(target, values).items()}
    given |= {key: value for key, value in wired.items() if key not in given and accepts(target, key)}
    return partial(target, **given) if node.get("_partial_", False) else target(**given)


def _made(value: Any) -> Any:
    if is_part(value):
        return make(value)
    if isinstance(value, Mapping):
        return {key: _made(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_made(item) for item in value)
    return value
