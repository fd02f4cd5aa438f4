"""Messages as NVFlare's data exchange objects, so that a site's privacy filters see tensors.

Tensors travel as safetensors inside NVFlare's own serialisation (its torch decomposer), bit for
bit and in pieces; facts are one JSON text. No type of ours is ever registered for decoding, so a
stranger's message can hold tensors, numbers and texts only.
"""

from __future__ import annotations

import json
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from fedmllm.errors import UserError
from fedmllm.sites.wire import Message

FACTS = "fedmllm"
ERROR, FINAL = "fedmllm_error", "fedmllm_final"
_KINDS = {"train": DataKind.WEIGHT_DIFF}


def prepare() -> None:
    """Let tensors be sent and received in this process."""
    fobs.register(TensorDecomposer)


def to_shareable(message: Message, kind: str = DataKind.WEIGHTS) -> Shareable:
    """A message to send. kind: what site filters take it for."""
    return DXO(
        kind, data=dict(message.tensors), meta={FACTS: json.dumps(message.facts)}
    ).to_shareable()


def answer(message: Message, task: str) -> Shareable:
    """A site's reply; an update is a difference of weights to filters."""
    return to_shareable(message, _KINDS.get(task, DataKind.WEIGHTS))


def failure(told: str, *, final: bool) -> Shareable:
    """A site's reply that says why it has nothing."""
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    reply.set_header(ERROR, told)
    reply.set_header(FINAL, final)
    return reply


def from_reply(shareable: Shareable) -> tuple[Message | None, str, bool]:
    """A reply's message, or None, why not, and whether asking again is of no use."""
    code = shareable.get_return_code()
    if code != ReturnCode.OK:
        told = shareable.get_header(ERROR) or f"the site answered {code}"
        return None, str(told), bool(shareable.get_header(FINAL, False))
    try:
        return to_message(shareable), "", False
    except UserError as error:
        return None, str(error), False


def take_message(shareable: Shareable) -> Message:
    """The message in a shareable, which gives up its tensors: NVFlare holds it while the task is
    worked on. Raises `UserError` if it holds none."""
    message = to_message(shareable)
    from_shareable(shareable).data.clear()
    return message


def to_message(shareable: Shareable) -> Message:
    """The message in a shareable. Raises `UserError` if it holds none."""
    try:
        dxo = from_shareable(shareable)
        facts: Any = json.loads(dxo.get_meta_prop(FACTS))
        tensors = dict(dxo.data or {})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"not a message of fedmllm: {error}") from error
    if not isinstance(facts, dict):
        raise UserError("not a message of fedmllm: its facts are no JSON object")
    return Message(tensors, facts)
