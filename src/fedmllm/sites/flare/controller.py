"""The server's job: our loop on NVFlare's base controller, a task a site.

Each request is a task of its own for one site, so that sites are waited for, given up and asked
again one by one; all of them share one copy of the tensors.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.wf_comm_spec import WFCommSpec

from fedmllm.errors import UserError
from fedmllm.sites import settings
from fedmllm.sites.central import Reply, StoppedError
from fedmllm.sites.flare import codec
from fedmllm.sites.wire import Message

_TICKET = "fedmllm_ticket"
_POLL = 0.1
SILENCE = 30.0  # seconds without a sign of life of a site's job


class FedController(Controller):
    """config_sha256: the experiment to run; the server looks it up in its own folder. silence:
    seconds without a sign of life after which a site's job counts as gone."""

    def __init__(self, config_sha256: str, silence: float = SILENCE) -> None:
        super().__init__(task_check_period=0.1)
        self.config_sha256, self.silence = config_sha256, silence
        self.lost: set[str] = set()
        self.seen: dict[str, float] = {}

    def set_communicator(self, communicator: WFCommSpec) -> None:
        """Also note when a site's job was last heard of: NVFlare does not report a job as dead
        whose whole site was killed and has registered anew."""
        super().set_communicator(communicator)
        told = communicator.client_is_active

        def heard(client_name: str, reason: str, fl_ctx: FLContext) -> None:
            self.seen[client_name] = time.monotonic()
            told(client_name, reason, fl_ctx)

        communicator.client_is_active = heard

    def silent(self) -> set[str]:
        """Sites whose job is not heard of any more; it sends a sign of life every few seconds."""
        now = time.monotonic()
        return {name for name, when in self.seen.copy().items() if now - when > self.silence}

    def start_controller(self, fl_ctx: FLContext) -> None:
        codec.prepare()

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The whole run."""
        from fedmllm.sites.serving import serve

        kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir()).resolve()
        try:
            sites = settings.load_server(kit).sites
            link = FlareLink(self, fl_ctx, abort_signal, sites)
            serve(kit, self.config_sha256, link, job=fl_ctx.get_job_id())
        except StoppedError:
            self.log_info(fl_ctx, "the job was stopped; it can be submitted again and goes on")
        except UserError as error:
            self.system_panic(str(error), fl_ctx)

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        self.log_info(fl_ctx, f"{client.name} answered {task_name} too late: dropped")

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.CLIENT_DISCONNECTED:
            self.lost.add(fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME))
        elif event_type == EventType.CLIENT_RECONNECTED:
            self.lost.discard(fl_ctx.get_prop(FLContextKey.RECONNECTED_CLIENT_NAME))


class FlareLink:
    """`central.Link` on a controller's tasks. sites: all that the server knows of."""

    def __init__(
        self,
        controller: FedController,
        fl_ctx: FLContext,
        abort_signal: Signal,
        sites: Sequence[str],
    ) -> None:
        self.sites = set(sites)
        self.controller, self.fl_ctx, self.abort_signal = controller, fl_ctx, abort_signal
        self.replies: queue.Queue[Reply] = queue.Queue()
        self.tasks: dict[str, Task] = {}
        self.shared: tuple[Message, Shareable] | None = None

    def send(self, site: str, task: str, message: Message) -> str:
        ticket = uuid.uuid4().hex
        made = Task(
            name=task,
            data=codec.to_shareable(message),
            props={_TICKET: ticket},
            result_received_cb=self._received,
            task_done_cb=self._done,
        )
        self.tasks[ticket] = made
        self.controller.send(made, self.fl_ctx, targets=[site])
        return ticket

    def cancel(self, ticket: str) -> None:
        task = self.tasks.pop(ticket, None)
        if task is not None:
            self.controller.cancel_task(task)

    def receive(self, seconds: float) -> Reply | None:
        until = time.monotonic() + seconds
        while True:
            if self.abort_signal.triggered:
                raise StoppedError
            left = until - time.monotonic()
            try:
                reply = self.replies.get(timeout=max(min(left, _POLL), 0.001))
            except queue.Empty:
                if left <= 0:
                    return None
                continue
            if self.tasks.pop(reply.ticket, None) is not None:
                return reply

    def gone(self) -> set[str]:
        """Lost and silent ones, and those that were not there when the job was dealt out: NVFlare
        lets nobody join a job that runs."""
        there = {client.name for client in self.fl_ctx.get_engine().get_clients()}
        return self.controller.lost | self.controller.silent() | (self.sites - there)

    def _received(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """In NVFlare's thread: hand the reply over and keep no copy."""
        message, error, final = codec.from_reply(client_task.result)
        client_task.result = None
        ticket = client_task.task.props[_TICKET]
        self.replies.put(Reply(ticket, client_task.client.name, message, error, final))

    def _done(self, task: Task, fl_ctx: FLContext) -> None:
        if task.completion_status == TaskCompletionStatus.CLIENT_DEAD:
            self.controller.lost.update(task.targets)
