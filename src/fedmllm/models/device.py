"""Memory that runs out: is that what an error says, and how is what was held given back?"""

from __future__ import annotations

import gc

import torch

# what PyTorch's allocators and libraries say where the class of the error does not
_WORDS = ("not enough memory", "DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or in main memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def release_memory() -> None:
    """Give back what no tensor holds any more; the error that told of it must be gone."""
    gc.collect()  # graphs and hooks hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
