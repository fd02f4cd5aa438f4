"""Estimated peak memory of a run: arithmetic, term by term. `docs/memory.md` says it in full.

Legend: B samples of a forward pass, T tokens of a sample, L layers, D width, F inner width of the
MLP, H heads of width d, K key-value heads, V vocabulary, r LoRA rank, b bytes of the model's
dtype (4 or 2), S slices of an image, N patches of a slice, p bytes of a patch's pixels in float32,
E, G and M width, inner width and layers of the tower. All results are bytes.

Exact are the weights, the adapter and its optimiser; `saved_per_token` is what autograd keeps of
a Llama or Qwen2 layer on a CPU, to the byte (tested against autograd). The rest are bounds or
rules of thumb, and the sum is an estimate: allocators keep more than they are asked for.

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
from fedmllm.models.features import MEMORY_BYTES
from fedmllm.plan.images import largest_image
from fedmllm.plan.structure import Skeleton, weight_bytes

CUDA_RUNTIME = 800 * 2**20  # context, kernels, cuBLAS workspace: an assumption, not measured here
HEAP_HOLES = 0.6  # of training: holes that freed tensors leave in glibc's heap, where tensors are
# below its 32 MB; one allowance for all, chosen on the embedded model (results/memory.json)
ANSWER_TOKENS = 32  # of a sample, where nothing else is said
NEW_TOKENS = 16  # that are generated for an open question


@dataclass(frozen=True)
class Shapes:
    """Sizes of the language model and the tower, from the config; see the module's legend.

    image_tokens: of one slice, in the language model. levels: features of each, more than one
    where layers of the decoder are given their own (Qwen3-VL).
    """

    D: int
    F: int
    L: int
    H: int
    K: int
    d: int
    V: int
    E: int
    G: int
    N: int
    M: int
    p: int
    image_tokens: int
    levels: int = 1


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
    rank: int
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
        heads = text.num_attention_heads
        shapes = Shapes(
            D=text.hidden_size,
            F=text.intermediate_size,
            L=text.num_hidden_layers,
            H=heads,
            K=getattr(text, "num_key_value_heads", None) or heads,
            d=getattr(text, "head_dim", None) or text.hidden_size // heads,
            V=text.vocab_size,
            E=tower,
            G=inner or int(tower * vision.mlp_ratio),
            N=cut.patches,
            M=getattr(vision, "num_hidden_layers", None) or vision.depth,
            p=_pixel_bytes(vision),
            image_tokens=cut.tokens,
            levels=1 + len(getattr(vision, "deepstack_visual_indexes", None) or ()),
        )
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the config of a {config.model_type!r} lacks a size: {error}") from error
    odd = {name: value for name, value in asdict(shapes).items() if not isinstance(value, int)}
    if odd:
        raise UserError(
            f"the config of a {config.model_type!r} has sizes that are no numbers: {odd}"
        )
    return shapes


def _pixel_bytes(vision: Any) -> int:
    """A patch in float32; the Qwen families repeat an image to fill a patch of several frames."""
    side = vision.patch_size
    area = math.prod(side) if isinstance(side, list | tuple) else side**2
    return 4 * 3 * area * (getattr(vision, "temporal_patch_size", None) or 1)


# -- terms -----------------------------------------------------------------------------------


def saved_per_token(shapes: Shapes, load: Load) -> int:
    """What autograd keeps of one decoder layer with LoRA on q, k, v and o, a token.

        b (4 H d + 3 F + T)         q, k, v repeated to H heads, attention's output; gate, its
                                    activation, up; the padding mask as one row of the layer's own
        4 (H + 4 r + 2 D + 2)       attention's normaliser; A x four times; two norms in float32
        (4 + m) (3 D + H d)         inputs of the four A after dropout in float32, with its mask

    Frozen matrices keep no input. m = 4 bytes a number on a CPU (the mask is a float), 1 on a
    GPU. Without dropout q, k, v share one input, which in half precision is cast three times.
    """
    b, wide = load.itemsize, shapes.H * shapes.d
    layer = b * (4 * wide + 3 * shapes.F + load.tokens)
    layer += 4 * (shapes.H + 4 * load.rank + 2 * shapes.D + 2)
    if load.dropout:
        return layer + (4 + (1 if load.cuda else 4)) * (3 * shapes.D + wide)
    return layer + (4 * shapes.D if b == 4 else 4 * (3 * shapes.D + wide))


def activations(shapes: Shapes, load: Load) -> dict[str, int]:
    """Kept for the backward pass of B samples, and what its busiest layer needs beside that.

    Kept: B T L `saved_per_token`; with gradient checkpointing b D a token and layer (its input)
    and one layer in full. Beside it: gradients in the MLP, b (3 F + 2 D) a token.
    """
    tokens, b = load.batch * load.tokens, load.itemsize
    layer = saved_per_token(shapes, load)
    kept = (b * shapes.D * shapes.L + layer) if load.checkpointing else shapes.L * layer
    return {
        "activations": tokens * kept,
        "backward": tokens * b * (3 * shapes.F + 2 * shapes.D),
    }


def train_logits(shapes: Shapes, load: Load) -> int:
    """The head runs over the tokens of answers only: B answer V (3 b + 8).

    Logits, their gradient by sample and joined (3 b), the float32 copy and its log-softmax (8).
    """
    answer = min(load.answer, load.tokens)
    return load.batch * answer * shapes.V * (3 * load.itemsize + 8)


def tower(shapes: Shapes, load: Load) -> int:
    """The tower on one image of S slices, without gradient: the larger of an MLP (input, its
    norm, inner width twice) and the connector (five matrices of width D), a patch, and the
    pixels in float32."""
    patches = load.slices * shapes.N
    widest = max(2 * shapes.E + 2 * shapes.G, 7 * shapes.E, shapes.E + 5 * shapes.D)
    return patches * (load.itemsize * widest + shapes.p)


def seen_in_training(shapes: Shapes, load: Load) -> int:
    """What a step keeps of B images where tower or connector are trained: of the connector
    4 (E + 5 D) a patch and its input, b E. Of a tower with LoRA, beside one image's forward pass
    and the pixels, as much as `saved_per_token` says of a decoder layer, with its own widths and an
    MLP of two matrices, a patch and layer. A rule of thumb: it was compared with no measurement."""
    patches = load.batch * load.slices * shapes.N
    kept = 4 * (shapes.E + 5 * shapes.D)
    if not load.vision:
        return patches * (kept + load.itemsize * shapes.E)
    mask = 1 if load.cuda else 4
    layer = load.itemsize * (4 * shapes.E + 2 * shapes.G) + 8 * shapes.E
    layer += (4 + mask) * 4 * shapes.E if load.dropout else 16 * shapes.E
    inputs = load.itemsize * shapes.E * shapes.M
    kept += inputs + layer if load.checkpointing else shapes.M * layer
    return patches * (kept + shapes.p) + tower(shapes, load)


def testing(shapes: Shapes, load: Load) -> dict[str, int]:
    """A test batch, without gradient, in the MLP of a layer: the embeddings, the layer's input, the
    residual, the MLP's input and its three products, and the mask, b (3 F + 4 D + T) a token; the
    logits of each sample's last token, at which alone the head runs, and as much again, 2 b B V;
    or, where answers are generated, (b + 4) B V and the key-value cache, 2 b L K d a token.
    """
    b, tokens = load.itemsize, load.test_batch * load.tokens
    terms = {"activations": tokens * b * (3 * shapes.F + 4 * shapes.D + load.tokens)}
    if load.generates:
        kept = tokens + NEW_TOKENS * load.test_batch
        terms["logits"] = load.test_batch * shapes.V * (b + 4)
        terms["key-value cache"] = 2 * b * shapes.L * shapes.K * shapes.d * kept
    else:
        terms["logits"] = 2 * b * load.test_batch * shapes.V
    return terms


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
    training = {
        **activations(shapes, load),
        "logits": train_logits(shapes, load),
        "gradients": 4 * trainable,
        "optimiser": 8 * trainable if load.adam else 0,
    }
    if load.sees:
        training["tower and connector"] = seen_in_training(shapes, load)
    if weights["nf4"]:  # a layer's matrices are unpacked one at a time
        training["unpacked 4-bit matrix"] = load.itemsize * shapes.D * shapes.F
    phases = {
        "image encoding": {"tower": tower(shapes, load)},
        "training": training,
        "testing": testing(shapes, load),
    }
    if not load.cuda:
        training["allocator"] = int(HEAP_HOLES * sum(training.values()))
    if not load.cuda:
        return Estimate(runtime, {**resident, **main}, phases, host=None)
    # a base is read into main memory first and moved from there
    host = runtime + resident["weights"] + sum(main.values())
    return Estimate(CUDA_RUNTIME, resident, phases, host=host)
