"""Estimated peak memory of a run, term by term. `docs/memory.md` says it in full.

What a step and a test batch take is counted by running them on shapes (`plan.tracing`). The rest is
arithmetic, with D the width of the language model and F the inner width of its MLP, b bytes of the
model's dtype (4 or 2), S slices of an image, N patches of a slice, p bytes of a patch's pixels in
float32, E, G and M width, inner width and layers of the tower. All results are bytes.

Exact are the weights, the adapter and its optimiser, and what autograd keeps of texts. The rest are
bounds or rules of thumb, and the sum is an estimate: allocators keep more than they are asked for.

Training keeps no key-value cache. A frozen tower sees an image once, without gradient, and its
features are kept in main memory: in the training phase it takes nothing. Where the connector is
trained, the tower's output is kept and the connector runs in every step; where the tower is
trained, pixels are kept and all of it runs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fedmllm.errors import UserError
from fedmllm.models.components import tower_of
from fedmllm.models.features import MEMORY_BYTES
from fedmllm.plan.images import largest_image
from fedmllm.plan.structure import Skeleton, weight_bytes
from fedmllm.plan.tracing import Batch, trace_step, trace_test

CUDA_RUNTIME = 800 * 2**20  # context, kernels, cuBLAS workspace: an assumption, not measured here
HEAP_HOLES = 0.6  # of a phase: holes that freed tensors leave in glibc's heap, where tensors are
# below its 32 MB; one allowance for all, chosen on the embedded model (results/memory.json)
ANSWER_TOKENS = 32  # of a sample, where nothing else is said


@dataclass(frozen=True)
class Shapes:
    """Sizes of the language model and the tower, from the config; see the module's legend.

    image_tokens: of one slice, in the language model. levels: features of each, more than one where
    layers of the decoder are given their own (Qwen3-VL). rotates: whether the tower has rotary
    position embeddings.
    """

    D: int
    F: int
    E: int
    G: int
    N: int
    M: int
    p: int
    image_tokens: int
    levels: int = 1
    rotates: bool = False


@dataclass(frozen=True)
class Load:
    """What a run asks of memory.

    tokens: of the longest sample. slices: of the largest image. batch: `training.micro_batch`.
    test_batch: `evaluation.batch_size`. images: different images of the data, or None if unknown.
    generates: whether tests generate answers (open questions). copies: float32 copies of the
    adapter on the server and between it and a client. blocks: bytes of the updates that an
    aggregation reads side by side. connector, vision: whether they are trained.
    feature_memory: bytes of image features that are kept.
    """

    tokens: int
    slices: int
    batch: int
    test_batch: int
    dropout: float
    adam: bool = True
    checkpointing: bool = False
    four_bit: bool = False
    cuda: bool = False
    itemsize: int = 4
    images: int | None = None
    generates: bool = True
    copies: int = 8
    blocks: int = 0
    answer: int = ANSWER_TOKENS
    connector: bool = False
    vision: bool = False
    feature_memory: int = MEMORY_BYTES

    @property
    def sees(self) -> bool:
        """Whether tower or connector run in every step."""
        return self.connector or self.vision


@dataclass(frozen=True)
class Estimate:
    """Peak = runtime + what stays (`resident`) + the largest of the phases, on the device.

    host: peak of main memory when the device is a GPU; None on a CPU, where all is one.
    """

    runtime: int
    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    host: int | None

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes."""
        most = sum(self.phases[self.phase].values())
        return self.runtime + sum(self.resident.values()) + most


def shapes_of(skeleton: Skeleton, *, tokens: int) -> Shapes:
    """Read the sizes. tokens: of a sample, which bounds images of any size.

    Raises `UserError` if the config lacks one.
    """
    config = skeleton.config
    text = config.get_text_config()
    cut = largest_image(config, skeleton.images, limit=tokens)
    try:
        vision = config.vision_config
        tower = getattr(vision, "embed_dim", None) or vision.hidden_size
        inner = getattr(vision, "intermediate_size", None) or getattr(vision, "mlp_dim", None)
        shapes = Shapes(
            D=text.hidden_size,
            F=text.intermediate_size,
            E=tower,
            G=inner or int(tower * vision.mlp_ratio),
            N=cut.patches,
            M=getattr(vision, "num_hidden_layers", None) or vision.depth,
            p=_pixel_bytes(vision),
            image_tokens=cut.tokens,
            levels=1 + len(getattr(vision, "deepstack_visual_indexes", None) or ()),
            rotates=_rotates(skeleton.base),
        )
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the config of a {config.model_type!r} lacks a size: {error}") from error
    odd = {name: value for name, value in asdict(shapes).items() if not isinstance(value, int)}
    if odd:
        raise UserError(
            f"the config of a {config.model_type!r} has sizes that are no numbers: {odd}"
        )
    return shapes


def _rotates(base: Any) -> bool:
    _, tower = tower_of(base) or ("", None)
    parts = tower.modules() if tower is not None else ()
    return any("Rotary" in type(part).__name__ for part in parts)


def _pixel_bytes(vision: Any) -> int:
    """A patch in float32; the Qwen families repeat an image to fill a patch of several frames."""
    side = vision.patch_size
    area = math.prod(side) if isinstance(side, list | tuple) else side**2
    return 4 * 3 * area * (getattr(vision, "temporal_patch_size", None) or 1)


# -- terms -----------------------------------------------------------------------------------


def tower(shapes: Shapes, load: Load) -> int:
    """The tower on one image of S slices, without gradient, a patch: five matrices of width E with
    an MLP's two of inner width, or with rotated queries and keys, six of width E in float32; or one
    of width E and the connector's five of width D, whichever is largest. Beside them the pixels
    three times: as the processor gives them, as the tower takes them, and their masks."""
    b, E = load.itemsize, shapes.E
    widest = max(b * (5 * E + 2 * shapes.G), b * (E + 5 * shapes.D))
    if shapes.rotates:
        widest = max(widest, b * 5 * E + 4 * 6 * E)
    return load.slices * shapes.N * (widest + 3 * shapes.p)


def seen_in_training(shapes: Shapes, load: Load) -> tuple[int, int]:
    """What a step keeps of B images where tower or connector are trained, and what it has beside
    that while a layer is computed again.

    Kept of the connector: 4 (E + 5 D) a patch and its input, b E. Of a tower with LoRA the pixels
    and, a patch and layer, b (6 E + G) and the inputs of four A in float32 after dropout with its
    mask, of a byte on a GPU; with checkpointing a layer's input, b E. A rule of thumb.
    """
    patches = load.batch * load.slices * shapes.N
    kept = 4 * (shapes.E + 5 * shapes.D)
    if not load.vision:
        return patches * (kept + load.itemsize * shapes.E), 0
    number = 4 + (1 if load.cuda else 4) if load.dropout else 4
    layer = load.itemsize * (6 * shapes.E + shapes.G) + number * 4 * shapes.E
    layers = shapes.M * (load.itemsize * shapes.E if load.checkpointing else layer)
    return patches * (kept + layers + shapes.p), patches * layer if load.checkpointing else 0


def feature_cache(shapes: Shapes, load: Load) -> int:
    """Of all images features, b D a token and level; the tower's output, b E a patch, where the
    connector is trained; or pixels where the tower is; at most the cache's budget."""
    if load.images is None:
        return load.feature_memory
    one = load.itemsize * load.slices * shapes.image_tokens * shapes.levels * shapes.D
    if load.connector:
        one = load.slices * shapes.N * load.itemsize * shapes.E
    if load.vision:
        one = load.slices * shapes.N * shapes.p
    return min(max(load.feature_memory, one), load.images * one)


def estimate(skeleton: Skeleton, load: Load, *, runtime: int) -> Estimate:
    """Peak memory of a run. runtime: main memory of the interpreter with its libraries loaded."""
    shapes = shapes_of(skeleton, tokens=load.tokens)
    weights = weight_bytes(skeleton, four_bit=load.four_bit)
    trainable = skeleton.trainable
    resident = {"weights": sum(weights.values()), "adapter": 4 * trainable}
    main = {
        "copies of the adapter": 4 * load.copies * trainable,
        "image features": feature_cache(shapes, load),
    }
    if load.blocks:
        main["updates side by side"] = load.blocks
    training = _training(skeleton, load)
    if load.sees:
        kept, beside = seen_in_training(shapes, load)
        training["tower and connector"] = kept + max(0, beside - training["backward"])
    if weights["nf4"]:  # a layer's matrices are unpacked one at a time
        training["unpacked 4-bit matrix"] = load.itemsize * shapes.D * shapes.F
    phases = {
        "image encoding": {"tower": tower(shapes, load)},
        "training": training,
        "testing": _testing(skeleton, load),
    }
    if not load.cuda:
        for phase in ("training", "testing"):
            phases[phase]["allocator"] = int(HEAP_HOLES * sum(phases[phase].values()))
        return Estimate(runtime, {**resident, **main}, phases, host=None)
    # a base is read into main memory first and moved from there
    host = runtime + resident["weights"] + sum(main.values())
    return Estimate(CUDA_RUNTIME, resident, phases, host=host)


def _training(skeleton: Skeleton, load: Load) -> dict[str, int]:
    """A step over texts, and the optimiser's moments. The gradients of what no text passes, such as
    a trained connector's, come on top."""
    step = trace_step(
        skeleton,
        Batch(
            load.batch,
            load.tokens,
            load.answer,
            checkpointing=load.checkpointing,
            byte_masks=load.cuda,
        ),
    )
    return {
        "activations": step.kept,
        "backward": step.beside,
        "gradients": max(0, 4 * skeleton.trainable - step.gradients),
        "optimiser": 8 * skeleton.trainable if load.adam else 0,
    }


def _testing(skeleton: Skeleton, load: Load) -> dict[str, int]:
    batch = Batch(load.test_batch, load.tokens, load.answer)
    return {"activations": trace_test(skeleton, batch, generates=load.generates)}
