"""Judge the answers of several results: what is to be asked, asking it, writing the marks."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmllm.errors import UserError
from fedmllm.judge.endpoint import Judge
from fedmllm.judge.marks import Item, Scheme, agreement, mean_of_parties, sampled, scores
from fedmllm.judge.prompt import SYSTEM, message, read_verdict
from fedmllm.judge.store import Verdicts
from fedmllm.report.judged import write_judged
from fedmllm.report.loading import Result, result_digest

ANSWERS_FILE = "answers.jsonl"
_SECRETS = {"auth", "authorization", "bearer", "credential", "credentials", "passwd", "password"}
_SECRETS |= {"secret", "secrets"}
_FIELDS = ("federation", "condition", "kind", "question", "expected", "given")


@dataclass(frozen=True)
class Job:
    """The answers of one result. folder: where they lie and where the marks go."""

    folder: Path
    result: Result
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Ask:
    """One request that has not been answered yet. folder: where its reply is kept."""

    key: str
    message: str
    folder: Path


@dataclass(frozen=True)
class Work:
    """What is to be judged, what of it is still to be asked, and all replies."""

    scheme: Scheme
    jobs: tuple[Job, ...]
    asks: tuple[Ask, ...]
    verdicts: Verdicts


def make_work(
    found: Sequence[Result], scheme: Scheme, conditions: Sequence[str] = ()
) -> tuple[Work, list[str]]:
    """The answers under the test conditions (none named: with both modalities, or the first that
    a run was tested under), and a line for each obstacle, with the results that it keeps from
    being judged.

    Raises `UserError` if nothing is left.
    """
    jobs = []
    obstacles: dict[str, list[Path]] = {}
    for result in found:
        file = Path(result["_path"])
        items, obstacle = _items(result, file, conditions)
        if obstacle:
            obstacles.setdefault(obstacle, []).append(file)
        else:
            jobs.append(Job(file.parent, result, tuple(items)))
    problems = [f"{_named(files)}: {obstacle}" for obstacle, files in obstacles.items()]
    if not jobs:
        seen = "\n  ".join(problems)
        raise UserError(f"there is nothing to judge\n  {seen}")
    verdicts = Verdicts()
    for job in jobs:
        verdicts.read(job.folder)
    asks = {ask.key: ask for job in jobs for ask in _asks(job, scheme)}
    left = tuple(ask for key, ask in asks.items() if key not in verdicts.known)
    return Work(scheme, tuple(jobs), left, verdicts), problems


def _named(files: Sequence[Path]) -> str:
    """One file, or the first of many and how many more."""
    more = len(files) - 1
    return f"{files[0]}" + (f" and {more} other{'s' * (more > 1)}" if more else "")


def _items(result: Result, file: Path, conditions: Sequence[str]) -> tuple[Sequence[Item], str]:
    """The answers to judge, or why there are none."""
    if obstacle := _obstacle(result, file):
        return (), obstacle
    try:
        items = read_answers(file.parent / ANSWERS_FILE, result["answers_sha256"])
    except UserError as error:
        return (), str(error)
    items = _under(items, conditions)
    return items, "" if items else f"was not tested under {' or '.join(conditions)}"


def _obstacle(result: Result, file: Path) -> str:
    """Why a result's answers cannot be judged."""
    if file.name != "result.json":  # reports look for marks beside result.json alone
        return "is not named result.json: nothing would read its marks; rename it"
    if result["task"].get("kind") == "choice":
        return "its answers are letters: there is nothing to judge"
    if not result.get("answers_sha256"):
        return "its run kept no answers (an older version): run it again"
    if not (file.parent / ANSWERS_FILE).exists():
        return f"{ANSWERS_FILE} is not beside it"
    return ""


def read_answers(file: Path, sha256: str) -> list[Item]:
    """The answers of a run. Raises `UserError` if they are not those that its result states."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{file}: is not what its result.json states: run it again")
    lines = [json.loads(line) for line in content.decode().split("\n") if line]
    return [Item(**{name: line[name] for name in _FIELDS}) for line in lines]


def _under(items: Sequence[Item], conditions: Sequence[str]) -> list[Item]:
    there = [item.condition for item in items]
    wanted = conditions or (["both"] if "both" in there else there[:1])
    return [item for item in items if item.condition in wanted]


def _asks(job: Job, scheme: Scheme) -> Iterator[Ask]:
    twice = [(item, 1) for item in sampled(job.items, scheme)]
    for item, repeat in [*((item, 0) for item in job.items), *twice]:
        words = message(item.question, item.expected, item.given)
        yield Ask(item.key(scheme, repeat), words, job.folder)


# -- what it will take -------------------------------------------------------------------------


def estimate_lines(
    work: Work, *, price_in: float | None = None, price_out: float | None = None
) -> list[str]:
    """Calls, tokens (a token is taken as four bytes) and, with prices per million tokens, cost."""
    judged = sum(len(job.items) for job in work.jobs)
    calls = len(work.asks)
    tokens_in = sum(_tokens(SYSTEM) + _tokens(ask.message) + 10 for ask in work.asks)
    longest = work.scheme.fields.get("max_tokens")
    most = longest if isinstance(longest, int) else 0
    lines = [
        f"{judged:,} answers of {len(work.jobs)} result{'s' * (len(work.jobs) != 1)}; "
        f"{calls:,} calls to {work.scheme.model}, the rest is known or the same",
        f"about {tokens_in:,} tokens in, {3 * calls:,} out"
        + (f" (at most {most * calls:,})" if most else ""),
    ]
    if price_in is not None or price_out is not None:
        known = (price_in or 0.0) * tokens_in
        low, high = (known + (price_out or 0.0) * n * calls for n in (3, max(most, 3)))
        lines.append(f"about {low / 1e6:,.2f}, at most {high / 1e6:,.2f}, without retries")
    return lines


def _tokens(text: str) -> int:
    return -(-len(text.encode()) // 4)


# -- asking ------------------------------------------------------------------------------------


def ask_all(
    work: Work, judge: Judge, *, concurrency: int = 4, told: Callable[[int], None] | None = None
) -> None:
    """Ask what is left, so many at a time; each reply is kept as it comes. told: how many so far.

    Raises the first failure after the requests under way have ended; what was answered is kept.
    """

    def one(ask: Ask) -> bool:
        if judge.stopped.is_set():
            return False
        try:
            work.verdicts.keep(ask.folder, ask.key, judge.ask(SYSTEM, ask.message))
        except BaseException:
            judge.stopped.set()  # at once, before this thread takes the next
            raise
        return True

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            waiting = [pool.submit(one, ask) for ask in work.asks]
            count = 0
            for future in as_completed(waiting):
                asked = future.result()
                count += asked
                if asked and told is not None:
                    told(count)
        except BaseException as error:
            judge.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if not isinstance(error, UserError):
                raise
            known = [work.verdicts.known.get(ask.key) for ask in work.asks]
            kept = sum(reply is not None and not reply.spent for reply in known)
            raise UserError(
                f"{error}\n  {kept:,} of {len(work.asks):,} replies are kept: "
                "the same command goes on from there"
            ) from None


# -- the marks ---------------------------------------------------------------------------------


def write_all(work: Work) -> list[tuple[Path, dict[str, Any]]]:
    """Write judged.json beside each result; all replies must be known. What was written."""
    made = []
    for job in work.jobs:
        marks = _marks(work, job)
        for ask in _asks(job, work.scheme):  # also those that another folder had
            work.verdicts.keep(job.folder, ask.key, work.verdicts.known[ask.key])
        made.append((write_judged(job.folder, marks), marks))
    return made


def _marks(work: Work, job: Job) -> dict[str, Any]:
    scheme = work.scheme
    twice = sampled(job.items, scheme)
    pairs = [(_verdict(work, item, 0), _verdict(work, item, 1)) for item in twice]
    known = work.verdicts.known
    replies = [known[key] for key in dict.fromkeys(ask.key for ask in _asks(job, scheme))]
    served: dict[str, int] = {}
    for reply in replies:
        served[reply.served] = served.get(reply.served, 0) + 1
    return {
        "result_sha256": result_digest(job.result),
        "answers_sha256": job.result["answers_sha256"],
        "judge": scheme.model,
        "served": served,
        "scheme": scheme.facts(),
        "conditions": _by_condition(work, job),
        "second": {**agreement(pairs), "seed": scheme.seed},
        "tokens": {
            "in": sum(reply.tokens_in for reply in replies),
            "out": sum(reply.tokens_out for reply in replies),
        },
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _by_condition(work: Work, job: Job) -> dict[str, Any]:
    found: dict[str, dict[str, list[Item]]] = {}
    for item in job.items:
        found.setdefault(item.condition, {}).setdefault(item.federation, []).append(item)
    return {condition: _scores(work, parties) for condition, parties in found.items()}


def _scores(work: Work, parties: Mapping[str, list[Item]]) -> dict[str, Any]:
    each = {
        name: scores(items, [_verdict(work, item, 0) for item in items])
        for name, items in parties.items()
    }
    return each[""] if list(each) == [""] else mean_of_parties(each)


def _verdict(work: Work, item: Item, repeat: int) -> bool | None:
    return read_verdict(work.verdicts.known[item.key(work.scheme, repeat)].text)


def parse_fields(given: Sequence[str]) -> dict[str, Any]:
    """``name=value`` of `--request`, the value as JSON or else a text; null leaves a field out."""
    fields = {}
    for item in given:
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise UserError(f"--request {item!r} must read name=value, e.g. max_tokens=200")
        if name in ("model", "messages", "stream", "n"):
            raise UserError(f"--request {name}: is not yours to set")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name] = value
        _check_field(name, fields[name])
    return fields


def _check_field(name: str, value: Any) -> None:
    for inner, part in _parts(name, value):
        if _is_secret(inner):
            raise UserError(
                f"--request {inner}: looks like a secret, which would stand in judged.json: "
                "give the key in the environment"
            )
        if isinstance(part, float) and not math.isfinite(part):
            raise UserError(f"--request {inner}: must be a finite number")


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A field and all that it holds, each with the name that it stands under."""
    yield name, value
    if isinstance(value, dict):
        for inner, part in value.items():
            yield from _parts(inner, part)
    elif isinstance(value, list):
        for part in value:
            yield from _parts(name, part)


def _is_secret(name: str) -> bool:
    """Whether a field is named like a credential: api_key, x-auth-token, Authorization; but not
    max_tokens, stop_token_ids or prompt_cache_key."""
    words = re.findall("[a-z0-9]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())
    ends = bool(words) and words[-1].endswith(("key", "keys", "token"))
    harmless = words[-2:] in (["cache", "key"], ["eos", "token"], ["bos", "token"])
    return not _SECRETS.isdisjoint(words) or (ends and not harmless)
