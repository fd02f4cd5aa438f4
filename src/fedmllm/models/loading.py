"""A frozen base and its processor from a folder, or the reason why it cannot be had.

What can be known from a checkpoint's configuration is said before its weights are read. No code
that lies beside a checkpoint is run unless the model is named for it.
"""

from __future__ import annotations

import contextlib
import inspect
import logging as python_logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    ProcessorMixin,
    dynamic_module_utils,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import PushToHubMixin, is_torchvision_available, logging

from fedmllm.errors import UserError
from fedmllm.models import minicpmv
from fedmllm.models.families import FAMILIES, Family, family_of
from fedmllm.models.quantize import check_quantised, nf4, packed_already, settle

_LOG = python_logging.getLogger("fedmllm")
# what transformers raises for a checkpoint's files that are not as they should be
BAD_FILES = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    IndexError,
    AssertionError,
    StopIteration,
    SafetensorError,
    StrictDataclassError,
)
# inputs of a forward pass that only a family's entry can fill
_SPECIAL = ("image_grid_thw", "mm_token_type_ids", "token_type_ids")


def load_base(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str,
    quantization: str = "none",
    remote_code: str | None = None,
) -> tuple[Any, Any]:
    """The frozen base and its processor, offline if `path` is a folder.

    quantization: ``none``, or ``nf4`` to read the decoder's linear layers in 4 bit; a checkpoint
    that bitsandbytes quantised to 4 bit stays as it is. remote_code: the model whose own code may
    be run; it must be `path`, word for word, and a warning says so.
    Raises `UserError` if the model cannot be read, takes no images, or has code of its own.
    """
    trust = _trusted(path, remote_code)
    try:
        config, processor = _described(path, trust)
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust}
        quantised = bool(packed_already(config))
        if quantization == "nf4" and not quantised:
            options["quantization_config"] = nf4(config, dtype=dtype, trust=trust)
            quantised = True
        if quantised:  # put in place at once: what is packed cannot be moved as floats are
            options["device_map"] = {"": device}
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except BAD_FILES as error:
        raise UserError(f"cannot load model {str(path)!r}: {first_line(error)}") from error
    model, found = loaded
    _check_tensors(path, found)
    _check_tokenizer(path, model, processor)
    _check_class(path, type(model), family(config))
    model.requires_grad_(False)
    if quantised:
        settle(model, dtype)
        return model.eval(), processor
    try:
        return model.to(torch.device(device)).eval(), processor
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        first = str(error).strip().splitlines()[0]
        raise UserError(f"device {device!r} cannot be used: {first}; cpu always can") from error


def resolve_dtype(dtype: str, device: str) -> str:
    """The dtype by name; of ``auto``, bfloat16 on a CUDA device that computes in it and float32
    elsewhere. A CUDA device that this machine lacks is taken for one that does."""
    if dtype != "auto":
        return dtype
    if not device.startswith("cuda"):
        return "float32"
    try:
        with torch.cuda.device(device):
            fits = torch.cuda.is_bf16_supported(including_emulation=False)
    except (RuntimeError, AssertionError, ValueError):  # no such device here: a plan for elsewhere
        return "bfloat16"
    return "bfloat16" if fits else "float32"


def shape_base(
    path: str | Path, *, dtype: torch.dtype, remote_code: str | None = None
) -> tuple[Any, Any]:
    """The base as `load_base` gives it, without weights: its tensors have shapes and no storage.

    Raises `UserError` as `load_base` does, but for what is wrong with the weights.
    """
    trust = _trusted(path, remote_code)
    try:
        config, processor = _described(path, trust)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, trust_remote_code=trust
            )
    except BAD_FILES as error:
        raise UserError(f"cannot build model {str(path)!r}: {first_line(error)}") from error
    _check_tokenizer(path, model, processor)
    _check_class(path, type(model), family(config))
    model.requires_grad_(False)
    return model.eval(), processor


def first_line(error: BaseException) -> str:
    """An error's first line, with its kind where the words alone say too little."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else repr(error)
    return first if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first}"


def _trusted(path: str | Path, remote_code: str | None) -> bool:
    """Whether the code beside a checkpoint may be run, with a warning where it may."""
    if remote_code is None or str(remote_code) != str(path):
        return False
    _LOG.warning(
        "remote_code: code that lies beside model %r is run with all rights of this process; it "
        "can read your data",
        str(path),
    )
    return True


def _described(path: str | Path, trust: bool) -> tuple[Any, Any]:
    """Configuration and processor of a checkpoint that can be used."""
    logging.disable_progress_bar()
    minicpmv.register()
    settings, _ = PreTrainedConfig.get_config_dict(path)
    _check_code(path, settings, trust)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    _check_config(path, config)
    try:
        with _never_asked():
            processor = _processor(path, config, trust)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain `Exception` for a file that is cut short
        if "custom code" in str(error):
            raise UserError(_runs_code(path, f"the processor of {str(path)!r}")) from error
        raise UserError(
            f"the processor of model {str(path)!r} cannot be read: {first_line(error)}"
        ) from error
    _check_processor(path, processor)
    return config, processor


def family(config: Any) -> Family:
    """A configuration's entry; a model that came with its own code may do without."""
    if config.model_type not in FAMILIES and _own_code(config):
        return Family()
    return family_of(config.model_type)


def _own_code(config: Any) -> bool:
    """Whether its class is from a checkpoint: transformers imports those into one package."""
    return type(config).__module__.startswith("transformers_modules.")


def _check_code(path: str | Path, settings: dict[str, Any], trust: bool) -> None:
    """Refuse a model that can only be built by running code from its own folder."""
    kind = settings.get("model_type")
    if "auto_map" in settings and kind not in CONFIG_MAPPING and not trust:
        raise UserError(_runs_code(path, f"model {str(path)!r} (type {kind!r})"))


def _runs_code(path: str | Path, what: str) -> str:
    return (
        f"{what} runs code of its own, which could read your data: use a model that transformers "
        "knows, or, if you trust that code, name the model in remote_code: "
        f"remote_code={str(path)!r}"
    )


@contextlib.contextmanager
def _never_asked() -> Iterator[None]:
    """Where transformers is not told whether to run code, it asks at the terminal, as the last
    resort of `AutoProcessor` does even where it is told: with no time to answer, it refuses."""
    given = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = given


def _check_config(path: str | Path, config: Any) -> None:
    """Refuse a model without images, or without an entry; its own code is judged when loaded."""
    check_quantised(path, config)
    if _own_code(config):
        return
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"model {str(path)!r} (type {config.model_type!r}) has no vision tower: choose an "
            f"image-text model of type {', '.join(sorted(FAMILIES))}"
        )
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    kind = known[0] if isinstance(known, (list, tuple)) else known
    _check_class(path, kind, None)
    _check_class(path, kind, family(config))


def _check_class(path: str | Path, kind: Any, entry: Family | None) -> None:
    """Refuse a model that does not take features of images in place of pixels, and one whose
    entry, if given, leaves out what it needs."""
    name = f"model {str(path)!r} ({kind.__name__})"
    modalities = getattr(kind, "input_modalities", ())
    if "video" in modalities and "image" not in modalities:
        raise UserError(f"{name} takes {' and '.join(modalities)}, no images")
    inputs = inspect.signature(kind.forward).parameters
    if "mm_encoder_outputs" not in inputs:
        raise UserError(
            f"{name} does not put an image's features among the tokens of one decoder, which "
            "federated fine-tuning of its adapter needs"
        )
    if entry is None:
        return
    given = {*entry.image_inputs, *(entry.token_types or ())[:1]}
    lacking = [each for each in _SPECIAL if each in inputs and each not in given]
    if lacking:
        raise UserError(f"{name} needs {', '.join(lacking)}: its family's entry must give them")


def _check_processor(path: str | Path, processor: Any) -> None:
    for part, what in (("image_processor", "pictures"), ("tokenizer", "text")):
        if getattr(processor, part, None) is None:
            raise UserError(f"model {str(path)!r}: its processor has no {part}, so no {what}")
    if getattr(processor, "image_token", None) is None:
        raise UserError(f"model {str(path)!r}: its processor names no image token")
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"model {str(path)!r} has no chat template: its processor needs one "
            "(chat_template.jinja in its folder)"
        )


def _check_tensors(path: str | Path, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is not its config's: what is missing would be random, and nobody
    would notice. found: transformers' `output_loading_info`."""
    missing = sorted(found["missing_keys"])
    foreign = sorted(found["unexpected_keys"])
    shapes = sorted(found["mismatched_keys"])
    facts = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
    facts += [f"has {len(foreign)} unknown tensors, e.g. {foreign[0]}"] if foreign else []
    facts += [
        f"{name} is {tuple(given)}, the model needs {tuple(needed)}"
        for name, given, needed in shapes[:1]
    ]
    if facts:
        raise UserError(
            f"the weights of model {str(path)!r} do not fit its config.json: {'; '.join(facts)}. "
            "Fetch them again, or use the config.json that they were saved with"
        )


def _check_tokenizer(path: str | Path, model: Any, processor: Any) -> None:
    """Refuse a tokenizer of another model: its ids would be other words, or none."""
    tokenizer, config = processor.tokenizer, model.config
    rows = model.get_input_embeddings().weight.shape[0]
    image = config.image_token_id
    facts = []
    if tokenizer.vocab_size > rows:
        facts.append(f"it has {tokenizer.vocab_size} words, the model {rows}")
    if image not in {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}:
        word = tokenizer.convert_ids_to_tokens(image) if image < len(tokenizer) else None
        facts.append(f"the model's image token {image} is {word!r} there")
    if facts:
        raise UserError(
            f"the tokenizer in {str(path)!r} does not fit the model: {'; '.join(facts)}. Use the "
            "tokenizer files that came with the weights"
        )


def _processor(path: str | Path, config: Any, trust: bool) -> Any:
    """The processor, without its video part; if it has no template, with its tokenizer's, as older
    checkpoints have it, or the family's."""
    entry = family(config)
    known: Any = PROCESSOR_MAPPING.get(type(config), None)
    if entry.processor is not None:
        processor = entry.processor(path, trust)
    elif known is not None and "video_processor" in known.get_attributes():
        processor = _without_video(known, path, trust)
    else:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
        if is_torchvision_available() and getattr(processor, "image_processor", None) is not None:
            # it takes torchvision's where that is installed, whose pixels differ from Pillow's
            processor.image_processor = _on_pillow(path, trust)
    if not getattr(processor, "chat_template", None):
        own = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
        processor.chat_template = own if isinstance(own, str) else entry.chat_template
    return processor


class _NoVideo(PushToHubMixin):
    """Stands where a processor keeps its video part, and answers None to every question.

    Video processors need torchvision; a processor asks its own only for settings.
    """

    model_input_names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """No settings, so that the processor can be printed."""
        return {}

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _on_pillow(path: str | Path, trust: bool) -> Any:
    """A checkpoint's image processor on Pillow, so that pictures become the same numbers with and
    without torchvision; another only where it has none on Pillow."""
    return AutoImageProcessor.from_pretrained(path, trust_remote_code=trust, backend="pil")


def _without_video(known: type[ProcessorMixin], path: str | Path, trust: bool) -> Any:
    """A processor of the class `known` that never loads a video processor.

    Built alike with and without torchvision; the class itself is left as it is.
    """

    class ImagesOnly(known):  # type: ignore[valid-type, misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if isinstance(argument, _NoVideo):
                return _NoVideo
            return super().check_argument_for_proper_class(argument_name, argument)

    parts: dict[str, Callable[..., Any]] = {
        "image_processor": partial(_on_pillow, trust=trust),
        "tokenizer": partial(AutoTokenizer.from_pretrained, trust_remote_code=trust),
        "video_processor": lambda _: _NoVideo(),
    }
    ImagesOnly.__name__ = known.__name__
    settings, _ = known.get_processor_dict(path)
    return ImagesOnly.from_args_and_dict(
        [parts[name](path) for name in known.get_attributes()], settings
    )
