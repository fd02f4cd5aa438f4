"""The gate at a site's border: a privacy filter that its policy (`local/privacy.json`) puts in
front of whatever a job sends.

It is the site's own, not the job's, and looks at what is really about to leave: an update's
tensors, the facts that a site may state, and no more than its settings reveal. Anything else is
blocked, and the server is told no more than that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from fedmllm.errors import UserError
from fedmllm.sites import settings
from fedmllm.sites.flare import codec
from fedmllm.sites.release import check_release


class ReleaseFilter(Filter):
    """Passes what `release.check_release` allows and blocks the rest.

    clip_norm: an update whose L2 norm is greater is scaled down to it; 0 leaves it as it is.
    """

    def __init__(self, clip_norm: float = 0.0) -> None:
        super().__init__()
        self.clip_norm = float(clip_norm)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if shareable.get_return_code() != ReturnCode.OK:
            return shareable
        kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir()).resolve()
        try:
            message = codec.to_message(shareable)
            check_release(message, settings.load_site(kit).reveal)
        except UserError as error:
            self.log_error(fl_ctx, f"blocked at the border: {error}")
            raise ContentBlockedException(str(error)) from error
        if self.clip_norm:
            clip(message.tensors, self.clip_norm)
        return shareable


def clip(tensors: dict[str, Any], limit: float) -> None:
    """Scale an update's delta, in place, to an L2 norm of at most `limit`; an answer without one
    is left alone."""
    delta = [value for name, value in tensors.items() if name.startswith("delta|")]
    if not delta:
        return
    norm = float(torch.linalg.vector_norm(torch.stack([v.double().norm() for v in delta])))
    if norm > limit:
        for value in delta:
            value.mul_(limit / norm)
