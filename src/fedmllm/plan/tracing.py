"""What a step and a test batch keep in memory, found by running them on tensors without storage.

The model of a plan has shapes only. Here its parameters become PyTorch's fake tensors, which every
operation accepts and which say what it would make; the passes that train and test (`Passes`) then
run on them as they are. Autograd keeps what it would keep, gradient checkpointing gives back what
it would give back, and a tensor counts from its making until nothing refers to it. So each family,
dtype and policy is counted by its own code, with no formula of ours for its layers. Token ids and
masks are real, so that what is decided by them is decided; large ones become fake as well.

Left out: images (`plan.memory` has what the tower takes), what packed matrices need on their way
(they are counted as if they were plain), and what an allocator keeps beside what it was asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmllm.models.passes import Encoded, Passes
from fedmllm.plan.structure import Skeleton

REAL_NUMBERS = 2**20  # a tensor of more is fake, whatever it is made of


@dataclass(frozen=True)
class Batch:
    """What is passed at once. size: samples. tokens: of the longest, `answer` of them its answer's.

    checkpointing: activations are computed again. byte_masks: dropout's masks are of one byte a
    number, as on a GPU, and not floats.
    """

    size: int
    tokens: int
    answer: int
    checkpointing: bool = False
    byte_masks: bool = False


@dataclass(frozen=True)
class Step:
    """Bytes of a training step beside the weights. kept: for the backward pass. beside: the most
    that was there at once, less `kept`. gradients: of the adapter, within it."""

    kept: int
    beside: int
    gradients: int


def trace_step(skeleton: Skeleton, batch: Batch) -> Step:
    """One forward and backward pass over texts."""
    with _on_shapes(skeleton) as (passes, live):
        base = passes.base
        if batch.checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})
            base.disable_input_require_grads()
        with passes.training(0), _masks_of_a_byte(batch.byte_masks), live:
            loss = passes.loss_sum(_texts(passes, batch))
            kept = live.now
            loss.backward()
        grads = [p.grad for p in passes.model.parameters() if p.grad is not None]
        for parameter in passes.model.parameters():
            parameter.grad = None
        if batch.checkpointing:
            base.activation_checkpointing_disable()
    return Step(kept, live.peak - kept, sum(grad.nbytes for grad in grads))


def trace_test(skeleton: Skeleton, batch: Batch, *, generates: bool) -> int:
    """The most that a test batch of texts has at once, bytes beside the weights.

    generates: whether answers are generated, of which the first pass is counted, or chosen.
    """
    with _on_shapes(skeleton) as (passes, live), live:
        items = _texts(passes, batch, options=not generates)
        if generates:
            with torch.no_grad():
                passes.read_prompts(items).logits.float()
        else:
            passes.score_options(items, batch_size=batch.size)
    return live.peak


def _texts(passes: Passes, batch: Batch, *, options: bool = False) -> list[Encoded]:
    """Texts of different lengths, so that a batch is padded. Of those with options the prompt is
    as long as a sample may be."""
    config = passes.base.config
    special = {value for value in vars(config).values() if type(value) is int}
    a, b, c = itertools.islice((i for i in itertools.count() if i not in special), 3)
    answer = min(batch.answer, batch.tokens - 1) if not options else 1
    made = []
    for i in range(batch.size):
        prompt = (a,) * max(1, batch.tokens - answer - i)
        given = ((b,), (c,)) if options else ()
        made.append(Encoded(str(i), prompt, (b,) * answer, None, given))
    return made


class Live(TorchDispatchMode):
    """Counts the storage of what operations make, while anything refers to it, in bytes: `now`, and
    `peak` at most. before: tensors that do not count."""

    def __init__(self, before: list[torch.Tensor], fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._fake = fake
        self._counted = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._large(func, args, kwargs or {})
        if made is None:
            made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage())
        return made

    def _large(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The fake result of an operation on real tensors, if it is large."""
        given = tree_leaves((args, kwargs))
        if self._fake is None or any(isinstance(each, FakeTensor) for each in given):
            return None
        with contextlib.suppress(Exception), self._fake:  # some need the numbers
            made = func(*args, **kwargs)
            tensors = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
            if any(x.numel() > REAL_NUMBERS for x in tensors):
                return made
        return None

    def _count(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._counted:
            return
        self._counted.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._counted.discard(place)
        self.now -= size


@contextlib.contextmanager
def _on_shapes(skeleton: Skeleton) -> Iterator[tuple[Passes, Live]]:
    """The skeleton's model with fake parameters on the CPU, and real buffers of ones."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    held: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[Any, Any] = {}
    for module in skeleton.model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                held.append((module._parameters, name, old))
                if old not in made:
                    with fake:
                        empty = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = nn.Parameter(empty, requires_grad=old.requires_grad)
        for name, old in module._buffers.items():
            if old is not None:
                held.append((module._buffers, name, old))
                made[old] = torch.ones(old.shape, dtype=old.dtype)
    try:
        for place, name, old in held:
            place[name] = made[old]
        passes = Passes(skeleton.model, skeleton.policy, pad_id=0)
        yield passes, Live([*made.values()], fake)
    finally:
        for place, name, old in held:
            place[name] = old


@contextlib.contextmanager
def _masks_of_a_byte(wanted: bool) -> Iterator[None]:
    """Dropout as a GPU does it."""
    old = nn.Dropout.forward

    def forward(self: nn.Dropout, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.native_dropout(input, self.p, True)[0] if self.training else input

    if wanted:
        nn.Dropout.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Dropout.forward = old  # type: ignore[method-assign]
