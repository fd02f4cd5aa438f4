"""A site's job: passes each task to the resident trainer and its answer back.

Runs in NVFlare's client job process, which never loads a model.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmllm.errors import UserError
from fedmllm.sites import settings
from fedmllm.sites.flare import codec
from fedmllm.sites.trainer import Trainer, TrainerError, give_back_memory


class SiteExecutor(Executor):
    """config_sha256: the experiment that the job is of; the site looks it up in its own folder."""

    def __init__(self, config_sha256: str) -> None:
        super().__init__()
        self.config_sha256 = config_sha256
        self.trainer: Trainer | None = None
        self.state: Path | None = None
        self.trouble: dict[str, Any] = {}  # the last error, until something succeeds

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            codec.prepare()
            self._prepare(fl_ctx)
        elif event_type == EventType.END_RUN and self.trainer is not None:
            self.trainer.end()
            self._status("no job", **self.trouble)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """One task. A trainer that dies or fails is an answer, not the end of the job."""
        if self.trainer is None:
            return codec.failure("the site's settings cannot be read: see its log", final=True)
        try:
            message = codec.take_message(shareable)
            give_back_memory()
            if task_name == "refused":
                return self._refused(str(message.facts.get("why")), fl_ctx)
            self._status(task_name, round=message.facts.get("round", -1) + 1)
            reply = self.trainer.ask(
                task_name, message, aborted=lambda: bool(abort_signal.triggered)
            )
            problems = reply.facts.get("problems") if task_name == "hello" else None
            if problems:
                self.log_error(fl_ctx, f"this site cannot train with the server: {problems}")
            self.trouble = {"error": "; ".join(problems)} if problems else {}
            self._status("waiting", **self.trouble)
            return codec.answer(reply, task_name)
        except TrainerError as error:
            self._failed(task_name, error, fl_ctx, called_off=bool(abort_signal.triggered))
            return codec.failure(error.told, final=error.final)
        except UserError as error:
            self._failed(task_name, error, fl_ctx)
            return codec.failure("the site was sent what it cannot read", final=False)

    def _refused(self, why: str, fl_ctx: FLContext) -> Shareable:
        """The server's words, and this site's own where it told the server less."""
        self.log_error(fl_ctx, f"the server refused this site: {why}")
        own = self.trouble.get("error", why)
        self.trouble = {"error": why} if own == why else {"error": why, "detail": own}
        self._status("refused", **self.trouble)
        return codec.answer(codec.Message(), "refused")

    def _failed(
        self, task: str, error: Exception, fl_ctx: FLContext, *, called_off: bool = False
    ) -> None:
        self.log_error(fl_ctx, f"{task}: {error}")
        if not called_off:
            self.trouble = {"error": str(error)}
        self._status("called off" if called_off else "failed", **self.trouble)

    def _prepare(self, fl_ctx: FLContext) -> None:
        kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir()).resolve()
        try:
            self.state = kit / settings.load_site(kit).state
        except UserError as error:
            self.log_error(fl_ctx, str(error))
            return
        self.state.mkdir(parents=True, exist_ok=True)
        job = fl_ctx.get_job_id()
        self.trainer = Trainer(
            kit,
            self.config_sha256,
            scratch=self.state / f"scratch-{job}",
            log=self.state / "trainer.log",
        )
        self.trainer.start()  # the model loads while the server loads its own

    def _status(self, doing: str, **facts: Any) -> None:
        if self.state is not None:
            settings.write_json(
                self.state / "status.json", {"doing": doing, **facts, "at": time.time()}
            )
