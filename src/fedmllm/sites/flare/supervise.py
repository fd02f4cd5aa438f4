"""What NVFlare leaves to others: nodes that are started again, jobs that are submitted again.

A job whose server was killed stays listed as running and does nothing; a site that was killed
registers again and is let into no job that runs. The supervisor sees both and aborts and resubmits
the job, which goes on from the run's last checkpoint. It runs on the server's machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmllm.config import config_hash, load_config
from fedmllm.errors import UserError
from fedmllm.sites import settings
from fedmllm.sites.flare.kits import write_job
from fedmllm.sites.flare.node import node_command, node_environment, prepare_node
from fedmllm.sites.settings import STATUS_FILE

_TICK = 0.5
_START = 180.0  # seconds that a job may take until its server process says something
_PATIENCE = 20.0  # seconds to wait for all sites where enough are there
_MOST_FAILURES = 3  # jobs in a row that ended without a round
_MOST_ASKED = 2  # jobs in a row that a connected site took no part in
_OVER = "FINISHED"


class Nodes:
    """The processes of kits on this machine, each in a group of its own; started again when they
    end."""

    def __init__(self, kits: Sequence[Path]) -> None:
        self.kits = [kit.resolve() for kit in kits]
        self.processes: dict[Path, subprocess.Popen[bytes]] = {}
        self.again: dict[Path, float] = {}

    def tend(self) -> None:
        """Start what does not run."""
        for kit in self.kits:
            process = self.processes.get(kit)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                _end_all(kit)  # its jobs
                del self.processes[kit]
                self.again[kit] = time.monotonic() + 2.0
            if time.monotonic() >= self.again.get(kit, 0.0):
                self.processes[kit] = self._start(kit)

    def _start(self, kit: Path) -> subprocess.Popen[bytes]:
        command = node_command(kit)
        _end_all(kit)
        prepare_node(kit)
        with (kit / "node.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=kit,
                env=node_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self) -> None:
        """End all of them, with their jobs."""
        for kit, process in self.processes.items():
            process.kill()
            _end_all(kit)
            process.wait()
        self.processes.clear()


def _end_all(kit: Path) -> None:
    """End every process of a kit: the node, its jobs, which are sessions of their own, and their
    trainers. Also those whose supervisor was killed: they hold the port and the name."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(kit).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


@dataclass
class Supervisor:
    """Sees one experiment through to its end.

    server, admin: kits on this machine. experiment: a name in the server's experiments/. tend: what
    keeps nodes alive, if that is this process' business. say: for a line to a person.
    """

    server: Path
    admin: Path
    experiment: str
    tend: Callable[[], None] = lambda: None
    say: Callable[[str], None] = print
    job: str = ""
    submitted: float = 0.0
    failures: int = 0
    _session: Any = None
    _trouble: str = ""
    _dead: set[str] = field(default_factory=set)
    _rounds: int = 0
    _enough_since: float = 0.0
    _back: dict[str, tuple[float, int]] = field(default_factory=dict)
    _asked: dict[str, int] = field(default_factory=dict)  # jobs dealt to a site that it was not in
    _out: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.file = settings.load_server(self.server)
        file = self.server / self.file.experiments / f"{self.experiment}.yaml"
        config = load_config(file)
        self.sha256 = config_hash(config)
        self.folder = self.server / self.file.runs / config.name

    def run(self) -> None:
        """Until the run is complete. Raises `UserError` if it cannot be completed."""
        try:
            while not self.done():
                self.tend()
                self.step()
                time.sleep(_TICK)
        finally:
            self._close()

    def done(self) -> bool:
        """Whether the run has its result, and its job is off the list."""
        return self.status().get("doing") == "done" and not self._active()

    def status(self) -> dict[str, Any]:
        """The run's status file; empty where there is none yet."""
        try:
            found: dict[str, Any] = json.loads((self.folder / STATUS_FILE).read_text())
            return found
        except (OSError, ValueError):
            return {}

    def step(self) -> None:
        """Look once, and do what is needed."""
        from nvflare.fuel.flare_api.api_spec import AuthorizationError

        try:
            self._look()
            self._trouble = ""
        except AuthorizationError as error:
            raise UserError(
                f"the administrator of {self.admin} may not do this: {error}"
            ) from error
        except _session_errors() as error:  # the server does not answer, now
            self._close()
            trouble = f"the server does not answer ({type(error).__name__}): waiting for it"
            if trouble != self._trouble and self.job:
                self.say(trouble)
            self._trouble = trouble

    def _look(self) -> None:
        if not self.job:
            self._submit_when_ready()
            return
        status = self._current()
        state = str(self._admin().get_job_status(self.job))
        dead = bool(status) and not _alive(int(status["pid"]))
        if state.startswith(_OVER) or (dead and status["doing"] == "stopped"):
            self._ended(state, status)
        elif dead and status["doing"] != "done":
            self._abort("the server's process of the job has ended")
        elif not status and time.monotonic() - self.submitted > _START:
            self._abort("the job has not begun")
        elif back := self._returned(status):
            self._abort(f"{', '.join(back)} is back")

    def _current(self) -> dict[str, Any]:
        """The status, if it is of the present job."""
        status = self.status()
        return status if status.get("job") == self.job else {}

    def _submit_when_ready(self) -> None:
        self._abort_others()
        there = self._connected()
        now = time.monotonic()
        enough = len(there) >= self.file.min_sites
        self._enough_since = (self._enough_since or now) if enough else 0.0
        everybody = len(there) == len(self.file.sites)
        if not everybody and not (enough and now - self._enough_since > _PATIENCE):
            self._wait_for_sites(there)
            return
        with tempfile.TemporaryDirectory() as folder:
            job = write_job(
                Path(folder) / self.experiment,
                self.sha256,
                name=self.experiment,
            )
            self.job = self._admin().submit_job(str(job))
        self.submitted, self._enough_since = now, 0.0
        self._rounds = int(self.status().get("rounds_done", 0))
        self._back.clear()
        self._asked |= {site: self._asked.get(site, 0) + 1 for site in there}
        self.say(f"submitted {self.experiment} to {', '.join(sorted(there))}: job {self.job}")

    def _wait_for_sites(self, there: set[str]) -> None:
        """Say so in the status file, which no job writes now."""
        status = self.status()
        if not self.folder.is_dir() or status.get("present") == sorted(there):
            return
        away = {site: "is not connected" for site in self.file.sites if site not in there}
        status.update(
            doing="waiting for sites to connect",
            present=sorted(there),
            away=away,
            min_sites=self.file.min_sites,
            at=time.time(),
        )
        settings.write_json(self.folder / STATUS_FILE, status)

    def _abort_others(self) -> None:
        """Jobs of this experiment that are listed as running and are not ours: the server died."""
        for job in self._admin().list_jobs():
            same = job.get("job_name") == self.experiment
            over = str(job.get("status")).startswith(_OVER) or job["job_id"] in self._dead
            if same and not over:
                self.say(f"aborting job {job['job_id']}, left by an earlier server or supervisor")
                self._try_abort(job["job_id"])

    def _ended(self, state: str, status: Mapping[str, Any]) -> None:
        if status.get("doing") == "done":
            self.job = ""
            return
        if status.get("doing") == "stopped":
            raise UserError(f"{self.experiment}: {status.get('error')}")
        rounds = int(self.status().get("rounds_done", 0))
        self.failures = 0 if rounds > self._rounds else self.failures + 1
        if self.failures >= _MOST_FAILURES:
            raise UserError(
                f"{self.experiment}: {self.failures} jobs in a row ended without a round, the last "
                f"as {state}: see log.txt in the server's kit"
            )
        self.say(f"job {self.job} ended as {state}: submitting it again")
        self.job = ""

    def _returned(self, status: Mapping[str, Any]) -> list[str]:
        """Sites that this job has lost, or never had, and that are connected again: at the next
        end of a round, or at once where nothing goes on without them. Not one that stays connected
        and keeps out of jobs, as its policy may have it."""
        self._asked |= dict.fromkeys(status.get("present", ()), 0)
        gone = set(status.get("gone", ())) - set(status.get("refused", ()))
        if not gone:
            self._back.clear()
            return []
        now, rounds = time.monotonic(), int(status.get("rounds_done", 0))
        there = self._connected()
        self._asked |= dict.fromkeys(gone - there, 0)  # it may be another one when it is back
        there -= self._keeping_out(gone & there)
        self._back = {s: self._back.get(s, (now, rounds)) for s in sorted(gone & there)}
        idle = str(status.get("doing", "")).startswith("waiting")
        return [
            site
            for site, (since, then) in self._back.items()
            if now - since > 2.0 and (idle or rounds > then)
        ]

    def _keeping_out(self, sites: set[str]) -> set[str]:
        """Those of `sites` that no further job is submitted for; says so once."""
        out = {site for site in sites if self._asked.get(site, 0) >= _MOST_ASKED}
        for site in sorted(out - self._out):
            self.say(
                f"{site} is connected and took no part in {_MOST_ASKED} jobs in a row: its policy "
                "(local/ in its kit) may forbid them, its log.txt says more; it is left out"
            )
        self._out = out
        return out

    def _abort(self, why: str) -> None:
        self.say(f"{why}: job {self.job} is aborted, and goes on from its checkpoint")
        self._try_abort(self.job)
        self.job = ""

    def _try_abort(self, job: str) -> None:
        """A job of a server that was killed cannot be aborted, and stays listed as running."""
        from nvflare.fuel.flare_api import api_spec as api

        with contextlib.suppress(
            api.JobNotFound, api.JobNotRunning, api.InternalError, api.CommandError
        ):
            self._admin().abort_job(job)
        self._dead.add(job)

    def _active(self) -> bool:
        """Whether our job is still being ended."""
        if not self.job:
            return False
        with contextlib.suppress(*_session_errors()):
            return not str(self._admin().get_job_status(self.job)).startswith(_OVER)
        return False

    def _connected(self) -> set[str]:
        return {client.name for client in self._admin().get_connected_client_list()} & set(
            self.file.sites
        )

    def _admin(self) -> Any:
        if self._session is None:
            with contextlib.redirect_stdout(None):
                self._session = _connected(self.admin)
        return self._session

    def _close(self) -> None:
        if self._session is not None:
            with contextlib.suppress(Exception):  # the server may be gone
                self._session.close()
            self._session = None


def _connected(admin: Path) -> Any:
    """A session of the administrator. One that cannot be is closed, also where a signal comes in
    between: its threads would keep this process from ending."""
    from nvflare.fuel.flare_api.flare_api import Session

    session = Session(username=_user(admin), startup_path=str(admin))
    try:
        session.try_connect(5.0)
    except BaseException:
        session.api.close()
        raise
    return session


def _user(admin: Path) -> str:
    """Whose certificate a kit holds. Raises `UserError` if it is no administrator's."""
    try:
        facts = json.loads((admin / "startup" / "fed_admin.json").read_text())
        return str(facts["admin"]["username"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{admin} is no administrator's kit: it lacks startup/fed_admin.json"
        ) from error


def _session_errors() -> tuple[type[Exception], ...]:
    """What NVFlare's session raises where the server is away or in between."""
    from nvflare.apis.fl_exception import FLCommunicationError
    from nvflare.fuel.flare_api import api_spec as api

    return (
        FLCommunicationError,
        api.NoConnection,
        api.NoReply,
        api.SessionClosed,
        api.SessionExpired,
        api.InternalError,
        api.AuthenticationError,
        api.CommandError,
        api.JobNotFound,
        ConnectionError,
        TimeoutError,
    )


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
