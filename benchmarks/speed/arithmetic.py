"""Row `arithmetic`: what each stage must compute and move, and how near to that a run comes.

Operations are counted from the sizes of the model's own layers (a multiplication and an addition
are two), for samples of the lengths that the embedded memes (training) and crisis (testing) have.
Attention is counted over all pairs of tokens, as it is computed without a special kernel. Norms,
activations and softmax are left out. `tests/test_speed.py` holds the formulas to what PyTorch's own
counter sees. The machine's rate is that of a product of float32 matrices, the best of several, on
one thread: of 1,024 x 1,024, and of a batch's tokens by the model's own layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import timed, write
from torch import nn

from fedmllm.algorithms.base import LocalObjective
from fedmllm.client import LocalPlan, train_client
from fedmllm.config import make_config
from fedmllm.data import load_dataset
from fedmllm.experiment import load_model
from fedmllm.federation import payload
from fedmllm.models.features import FeatureCache
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.prompts import render


@dataclass(frozen=True)
class Sizes:
    """Weights and widths.

    linear: of the decoder's frozen matrices, without `last`, the feed-forward block of the last
    layer, which is needed at the answer's tokens only. lora: of its adapters. attention: layers
    times heads times their width. head: width times vocabulary. Tower and connector likewise, with
    patches of a picture and features that the connector makes of them; slices: pictures that the
    processor makes of one.
    """

    layers: int
    linear: int
    last: int
    lora: int
    attention: int
    head: int
    tower_linear: int
    tower_attention: int
    patches: int
    connector: int
    features: int
    slices: int


def linear_weights(module: nn.Module) -> int:
    """Weights of frozen matrix products below a module, without adapters'."""
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    return sum(m.weight.numel() for name, m in found if "lora_" not in name)


def sizes_of(mllm: Mllm, slices: int) -> Sizes:
    """Of an Idefics3 model. slices: pictures that the processor makes of one."""
    text, vision = mllm.base.config.text_config, mllm.base.config.vision_config
    inner = mllm.base.base_model
    last = linear_weights(inner.text_model.layers[-1].mlp)
    head = mllm.base.get_output_embeddings().weight.numel()
    patches = (vision.image_size // vision.patch_size) ** 2
    convolution = 3 * vision.patch_size**2 * vision.hidden_size
    return Sizes(
        layers=text.num_hidden_layers,
        linear=linear_weights(inner.text_model) - last,
        last=last,
        lora=sum(v.numel() for n, v in mllm.trainable.items() if "lora_" in n),
        attention=text.num_hidden_layers * text.num_attention_heads * text.head_dim,
        head=head,
        tower_linear=linear_weights(inner.vision_model) + convolution,
        tower_attention=vision.num_hidden_layers * vision.hidden_size,
        patches=patches,
        connector=linear_weights(inner.connector),
        features=patches // mllm.base.config.scale_factor**2,
        slices=slices,
    )


def see(sizes: Sizes) -> int:
    """One image through the tower and the connector: 2 N w + 4 N^2 d L, and 2 n w."""
    n = sizes.patches
    tower = 2 * n * sizes.tower_linear + 4 * n * n * sizes.tower_attention
    return sizes.slices * (tower + 2 * sizes.features * sizes.connector)


def forward(sizes: Sizes, tokens: int, answer: int) -> int:
    """The decoder over T tokens, what follows over A: 2 T (w + r) + 4 T^2 d L + 2 A (f + D V)."""
    matrices = 2 * tokens * (sizes.linear + sizes.lora)
    return matrices + 4 * tokens**2 * sizes.attention + 2 * answer * (sizes.last + sizes.head)


def train(sizes: Sizes, tokens: int, answer: int) -> int:
    """Forward, and backward: to the inputs as much again, attention twice as much, and to the
    adapters' weights. The first layer's inputs need no gradient; that is not taken off."""
    backward = 2 * tokens * (sizes.linear + 2 * sizes.lora) + 8 * tokens**2 * sizes.attention
    return forward(sizes, tokens, answer) + backward + 2 * answer * (sizes.last + sizes.head)


def rate(rows: int, inner: int, columns: int, repeats: int = 30) -> float:
    """Operations a second of a product of matrices: the best of several."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * columns / best


def bandwidth(megabytes: int = 256, repeats: int = 10) -> float:
    """Bytes a second read from memory by a sum: the best of several."""
    values = torch.ones(megabytes * 2**18)
    seconds = min(timed(values.sum)[1].wall for _ in range(repeats))
    return values.nbytes / seconds


def encode(mllm: Mllm, task: str, count: int) -> tuple[list[Encoded], float]:
    """Samples of a task, and the seconds of the tower and its processor for one image."""
    kind = {"name": task, "train": 4 * count, "test": 8}
    dataset = load_dataset(**make_config({"name": "x", "data": kind}).data)
    samples = dataset.train[:count]
    mllm.features = FeatureCache()
    images = [sample.image for sample in samples if sample.image is not None]
    _, took = timed(lambda: [mllm.image_features(image) for image in images])
    style = "plain"
    items = [mllm.encode(render(sample, dataset.task, style)) for sample in samples]
    return items, took.wall / len(images)


def stage(name: str, flops: float, seconds: float, top: float) -> dict[str, Any]:
    """What one of its things takes, and the share of the matrix rate that is reached."""
    return {
        "stage": name,
        "flops": flops,
        "seconds": seconds,
        "flops_per_second": flops / seconds,
        "share_of_rate": flops / seconds / top,
    }


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return statistics.fmean(values)


def main(quick: bool) -> None:
    """Every stage once."""
    torch.set_num_threads(1)
    mllm = load_model(make_config({"name": "arithmetic"}))
    params = mllm.init_adapter(0)
    mllm.set_adapter(params)
    memes, per_image = encode(mllm, "memes", 32 if quick else 128)
    crisis, _ = encode(mllm, "crisis", 32 if quick else 128)
    tokens = mean([len(item) for item in memes])
    sizes = sizes_of(mllm, slices_of(mllm, memes[0]))
    text = mllm.base.config.text_config
    square = rate(1024, 1024, 1024)
    own = rate(round(8 * tokens), text.hidden_size, text.intermediate_size)
    plan = LocalPlan()
    _, training = timed(
        lambda: train_client(
            mllm,
            params,
            memes,
            client="c",
            round_=1,
            seed=0,
            lr=1e-3,
            plan=plan,
            objective=LocalObjective(),
        )
    )
    _, testing = timed(lambda: mllm.score_options(crisis))
    trained = mean([train(sizes, len(item), len(item.answer)) for item in memes])
    tested = mean([forward(sizes, len(item.prompt) + 1, 1) for item in crisis])
    # each step reads the base twice, and writes and reads what backward needs; here: the weights
    weights = 4 * (sizes.linear + sizes.last + sizes.head)
    cases = [
        stage("an image through the tower", see(sizes), per_image, square),
        stage("training on a sample", trained, training.wall / len(memes), square),
        stage("scoring a question of eight options", tested, testing.wall / len(crisis), square),
    ]
    for case in cases:
        print(
            f"{case['stage']}: {case['flops'] / 1e9:.3f} GFLOP, {case['seconds'] * 1e3:.1f} ms, "
            f"{case['share_of_rate']:.0%} of the matrix rate",
            flush=True,
        )
    facts = {
        "stages": cases,
        "rate_square": square,
        "rate_own_layers": own,
        "read_bytes_per_second": bandwidth(),
        "sizes": asdict(sizes),
        "tokens": {"memes": tokens, "crisis": mean([len(item.prompt) for item in crisis])},
        "adapter_bytes": payload(params),
        "weight_bytes": weights,
        "update_bytes": {"up": payload(params), "down": payload(params)},
    }
    write("arithmetic", [facts], what=__doc__ or "", quick=quick)


def slices_of(mllm: Mllm, item: Encoded) -> int:
    """Pictures that the processor makes of a sample's image."""
    if item.image is None:
        raise ValueError("the sample has no image")
    _, inputs = mllm.family.read(mllm.processor, item.image.open())
    return int(torch.as_tensor(inputs["pixel_values"]).shape[-4])
