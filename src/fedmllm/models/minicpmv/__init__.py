"""MiniCPM-V-2.6 and MiniCPM-Llama3-V-2.5 for transformers' Auto classes, without remote code.

Importing this package registers `model_type: minicpmv`, which transformers leaves to code that
comes with the weights. A user of private data should not have to run that, and under
transformers 5 it loads wrongly.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from fedmllm.models.minicpmv.configuration import MiniCPMVConfig
from fedmllm.models.minicpmv.image_processing import MiniCPMVImageProcessor
from fedmllm.models.minicpmv.modeling import MiniCPMVForConditionalGeneration
from fedmllm.models.minicpmv.processing import MiniCPMVProcessor

__all__ = [
    "MiniCPMVConfig",
    "MiniCPMVForConditionalGeneration",
    "MiniCPMVImageProcessor",
    "MiniCPMVProcessor",
    "register",
]


def register() -> None:
    """Make the Auto classes read `model_type: minicpmv` with this package. Safe to repeat."""
    config = MiniCPMVConfig
    AutoConfig.register("minicpmv", config, exist_ok=True)
    AutoModelForImageTextToText.register(config, MiniCPMVForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        config, image_processor_classes={"pil": MiniCPMVImageProcessor}, exist_ok=True
    )
    AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    AutoProcessor.register(config, MiniCPMVProcessor, exist_ok=True)


register()
