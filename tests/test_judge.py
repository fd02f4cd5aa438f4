"""Answers judged by a language model: numbers by hand, and a server with every fault."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from judge_server import QUESTIONS, Server, asked, completion, fair, open_run
from synthetic_grid import result, write
from test_cli import call

from fedmllm.config import make_config
from fedmllm.errors import UserError
from fedmllm.experiment import run
from fedmllm.judge import (
    Endpoint,
    Judge,
    Reply,
    Scheme,
    ask_all,
    endpoint_from,
    make_work,
    parse_fields,
)
from fedmllm.judge.marks import Item, agreement, mean_of_parties, sampled, scores
from fedmllm.judge.prompt import PARSING, read_verdict
from fedmllm.judge.store import Verdicts
from fedmllm.report import csv_table, load_results, markdown_table, write_report, write_tables
from fedmllm.report.facts import judge_of
from fedmllm.report.grid_tables import grid_tables, markdown_grid, note
from fedmllm.report.judged import judged_digest, write_judged

KEY = "sk-a-secret-of-the-user"


@pytest.fixture
def serve():
    """Start servers; all are closed in the end."""
    servers = []

    def start(*behaviour) -> Server:
        servers.append(Server(*behaviour))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def judge(monkeypatch, capsys):
    """`fedmllm judge` with a server in the environment."""

    def call_(server: Server | None, *words: object) -> tuple[int, str, str]:
        for name in ("FEDMLLM_JUDGE_URL", "FEDMLLM_JUDGE_KEY", "OPENAI_BASE_URL"):
            monkeypatch.delenv(name, raising=False)
        if server is not None:
            monkeypatch.setenv("FEDMLLM_JUDGE_URL", server.url)
            monkeypatch.setenv("FEDMLLM_JUDGE_KEY", KEY)
        return call(monkeypatch, capsys, "judge", *words, "--model", "judge-1")

    return call_


def marks(folder: Path) -> dict:
    return json.loads((folder / "judged.json").read_text())


def item(question: str, expected: str = "yes", given: str = "yes", kind: str = "open") -> Item:
    return Item("", "both", kind, question, expected, given)


# -- verdicts and numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("CORRECT", True),
        ("incorrect", False),
        ("**Incorrect.**\n", False),
        ("The organ is the same.\n\nVerdict: CORRECT", True),
        ("<think>it is INCORRECT\nCORRECT</think>\nINCORRECT", False),
        ("_CORRECT_", True),
        ("", None),
        ("not correct", None),  # a word that is not asked for is not guessed
        ("CORRECT or INCORRECT", None),
        ("INCORRECTLY", None),
        ("CORRECT\nbut I am not sure", None),
        ("<think>a</think>CORRECT", True),
        ("<think>is it the same?\nCORRECT", None),  # cut off in its thoughts
        ("正确", None),
        ("CORRECT <think>sure</think>", True),  # closed at the end
        ("Shall I <think> aloud?\nCORRECT", None),  # never closed
        ("answer\nInCorrect 🙂\n \t", False),
        ("answercorrect", None),
    ],
)
def test_only_a_plain_verdict_is_one(reply, verdict) -> None:
    assert read_verdict(reply) is verdict


def test_the_rule_of_reading_says_what_is_done() -> None:
    """Each sentence has its cases above; an open thought decides, not how the reply ends."""
    assert "with a <think> that is not closed is unparsable" in PARSING
    assert "ends in them" not in PARSING


def test_scores_by_hand() -> None:
    """Of four verdicts one cannot be read: 2 of 3 are correct; 2 of 4 at least, 3 of 4 at most."""
    items = [
        item("a", "two", "2", "slake/open"),  # the same after normalisation
        item("b", "left", "on the left", "slake/open"),
        item("c", "yes", "no", "slake/closed"),
        item("d", "yes", "maybe", "slake/closed"),
    ]
    found = scores(items, [True, True, False, None])
    assert (found["n"], found["correct"], found["unparsable"]) == (4, 2, 1)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_se"] == pytest.approx((2 / 9 / 3) ** 0.5)
    assert (found["least"], found["most"], found["exact_match"]) == (0.5, 0.75, 0.25)
    assert found["groups"]["slake/open"]["accuracy"] == 1.0
    assert found["groups"]["slake/open"]["exact_match"] == 0.5
    assert found["groups"]["closed"]["accuracy"] == 0.0
    assert found["groups"]["closed"]["unparsable"] == 1
    assert scores(items, [None] * 4)["accuracy"] is None


def test_agreement_by_hand() -> None:
    """6 of 8 alike. By chance: both 4 of 8 correct, so .5 alike; kappa (.75 - .5) / .5 = .5."""
    pairs = [(True, True)] * 3 + [(False, False)] * 3 + [(True, False), (False, True)]
    found = agreement([*pairs, (None, True), (False, None)])
    assert found["asked"] == 10
    assert (found["read"], found["same"], found["share"]) == (8, 6, 0.75)
    assert found["kappa"] == pytest.approx(0.5)
    assert agreement([(True, True)] * 5)["kappa"] is None  # chance explains it all
    assert agreement([])["share"] is None


def test_the_mean_of_parties_counts_parties_alike() -> None:
    one = scores([item("a")], [True])
    many = scores([item(str(i)) for i in range(4)], [True, False, False, None])
    found = mean_of_parties({"a": one, "b": many})
    assert found["accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert (found["n"], found["unparsable"], found["exact_match"]) == (5, 1, 1.0)
    assert found["per_party"]["b"] == many


def test_the_sample_is_drawn_by_content() -> None:
    scheme = Scheme("m", {}, second=5)
    items = [item(f"question {i}") for i in range(40)]
    drawn = {i.question for i in sampled(items, scheme)}
    assert len(drawn) == 5
    assert {i.question for i in sampled(items[::-1] * 2, scheme)} == drawn
    fewer = [i for i in items if i.question not in sorted(drawn)[:2]]
    assert len({i.question for i in sampled(fewer, scheme)} & drawn) == 3
    assert {i.question for i in sampled(items, Scheme("m", {}, second=5, seed=1))} != drawn


def test_what_decides_a_verdict_is_in_its_key() -> None:
    base, scheme = item("q"), Scheme("m", {})
    keys = {
        base.key(scheme),
        base.key(scheme, 1),
        base.key(Scheme("other", {})),
        base.key(Scheme("m", {"max_tokens": 99})),
        item("q?").key(scheme),
        item("q", "no").key(scheme),
        item("q", "yes", "no").key(scheme),
    }
    assert len(keys) == 7
    assert item("q", kind="closed").key(Scheme("m", {}, second=3, seed=9)) == base.key(scheme)


# -- the environment ---------------------------------------------------------------------------


def test_a_key_goes_to_its_own_address_only() -> None:
    both = {"OPENAI_BASE_URL": "https://a.test/v1", "OPENAI_API_KEY": "k1"}
    found = endpoint_from(both)
    assert (found.url, found.key) == ("https://a.test/v1/chat/completions", "k1")
    mine = endpoint_from({**both, "FEDMLLM_JUDGE_URL": "http://b.test:8000/v1/chat/completions"})
    assert (mine.url, mine.key) == ("http://b.test:8000/v1/chat/completions", "")
    assert "a.test" not in repr(found)
    assert "k1" not in repr(found)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "set the environment variable FEDMLLM_JUDGE_URL"),
        ({"OPENAI_API_KEY": "k"}, "no judge is named"),  # a key alone names no address
        ({"OPENAI_BASE_URL": "ftp://x"}, "OPENAI_BASE_URL is no address"),
        ({"FEDMLLM_JUDGE_URL": "localhost:80"}, "FEDMLLM_JUDGE_URL is no address"),
        ({"OPENAI_BASE_URL": "https://[::1/v1"}, "OPENAI_BASE_URL is no address: its host or port"),
        ({"OPENAI_BASE_URL": "https://h:abc/v1"}, "is no address: its host or port"),
        ({"OPENAI_BASE_URL": "https://ex..ample/v1"}, "is no address: its host or port"),
        ({"OPENAI_BASE_URL": f"https://{'a' * 64}.test/v1"}, "is no address: its host or port"),
        ({"OPENAI_BASE_URL": "https://h:65536/v1"}, "its port must be from 1 to 65535"),
        ({"OPENAI_BASE_URL": "https://h:0/v1"}, "its port must be from 1 to 65535"),
        ({"OPENAI_BASE_URL": "https://h/v1?api-version=1"}, r"without \? or #"),
        ({"OPENAI_BASE_URL": "https://h/v1#a"}, r"without \? or #"),
        ({"OPENAI_BASE_URL": "https://h /v1"}, "a space or a control character"),
        ({"OPENAI_BASE_URL": "https:///v1"}, "must begin with"),
        ({"OPENAI_BASE_URL": "http://x", "OPENAI_API_KEY": "a\nb"}, "OPENAI_API_KEY holds"),
        ({"OPENAI_BASE_URL": "http://x", "OPENAI_API_KEY": "schlüssel"}, "OPENAI_API_KEY holds"),
    ],
)
def test_an_environment_that_names_no_judge(environment, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        endpoint_from(environment)
    assert "schlüssel" not in str(caught.value)


def test_fields_of_a_request() -> None:
    given = ["temperature=null", "max_completion_tokens=900", "reasoning_effort=low"]
    scheme = Scheme("m", parse_fields(given))
    assert scheme.fields == {
        "model": "m",
        "max_tokens": 64,
        "max_completion_tokens": 900,
        "reasoning_effort": "low",
    }
    assert Scheme("m", {}).fields == {"model": "m", "temperature": 0, "max_tokens": 64}
    for bad in ("temperature", "=1", "model=x", "n=3"):
        with pytest.raises(UserError, match="--request"):
            parse_fields([bad])


@pytest.mark.parametrize(
    "given",
    [
        "temperature=NaN",
        "top_p=-Infinity",
        "max_tokens=1e400",
        'logit_bias={"1": [0, NaN]}',
    ],
)
def test_numbers_of_a_request_are_finite(given) -> None:
    with pytest.raises(UserError, match="must be a finite number"):
        parse_fields([given])


@pytest.mark.parametrize("timeout", ["inf", "nan", "86401", "0"])
def test_a_time_limit_is_bounded(judge, serve, tmp_path, timeout) -> None:
    server = serve()
    code, _, err = judge(server, open_run(tmp_path), "--yes", "--timeout", timeout)
    assert code == 2
    assert "timeout" in err
    assert "tries" not in err
    assert "Traceback" not in err
    assert server.seen == []


SECRET_NAMES = ["api_key", "apikey", "apiKey", "x-api-key", "key", "token", "access_token"]
SECRET_NAMES += ["Authorization", "auth", "bearer", "client_secret", "password", "HF_TOKEN"]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_request_holds_no_secret(name) -> None:
    for given in (f"{name}=hush-hush", json.dumps({"a": [{name: "hush-hush"}]}).join(["x=", ""])):
        with pytest.raises(UserError, match=f"{name}: looks like a secret") as caught:
            parse_fields([given])
        assert "hush" not in str(caught.value)


def test_fields_that_only_sound_like_secrets() -> None:
    given = ["max_tokens=9", "max_completion_tokens=9", "stop_token_ids=[1]", "prompt_cache_key=a"]
    assert len(parse_fields([*given, "skip_special_tokens=true", "author=b"])) == 6


def test_a_request_that_cannot_be_sent_is_told_at_once(serve) -> None:
    server = serve()
    for url, request in (
        (f"{server.url}/chat/completions", {"seed": float("nan")}),
        (f"{server.url}/chat/completions", {"user": "\ud800"}),
        ("https://h:abc/v1/chat/completions", {}),
    ):
        asking = Judge(Endpoint(url, KEY), request)
        with pytest.raises(UserError, match="the request cannot be sent"):
            asking.ask("s", "m")
        asking.close()
    assert server.seen == []


# -- from runs to marks ------------------------------------------------------------------------


def test_judging_a_run(serve, judge, tmp_path) -> None:
    folder, server = open_run(tmp_path), serve()
    code, out, _ = judge(server, folder, "--yes", "--second", 2)
    assert code == 0
    assert "judged 0.600, exact match 0.400, 5 answers, 0 verdicts unparsable" in out
    assert "judged twice: 2 of 2 alike" in out
    assert len(server.seen) == 7
    assert all(body["temperature"] == 0 for body in server.seen)
    assert {body["model"] for body in server.seen} == {"judge-1"}
    assert {asked(body)["question"] for body in server.seen} == {row[1] for row in QUESTIONS}
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert set(server.paths) == {"/v1/chat/completions"}
    found = marks(folder)
    assert found["judge"] == "judge-1"
    assert found["served"] == {"judge-2026-01": 7}
    assert found["tokens"] == {"in": 700, "out": 14}
    assert found["conditions"]["both"]["groups"]["open"]["accuracy"] == pytest.approx(2 / 3)
    assert found["conditions"]["both"]["groups"]["closed"]["exact_match"] == 0.5
    assert "CORRECT or INCORRECT" in found["scheme"]["system"]
    for file in folder.iterdir():  # neither key nor address is anywhere
        assert KEY not in file.read_text()
        assert "127.0.0.1" not in file.read_text()


def test_what_is_known_is_not_asked_again(serve, judge, tmp_path) -> None:
    one, server = open_run(tmp_path, "one"), serve()
    two = open_run(tmp_path, "two", seed=1)
    assert judge(server, one, "--yes", "--second", 0)[0] == 0
    assert len(server.seen) == 5
    code, out, _ = judge(server, tmp_path, "--second", 0)  # nothing to ask: nothing to confirm
    assert code == 0
    assert "10 answers of 2 results; 0 calls" in out
    assert len(server.seen) == 5
    assert marks(two)["conditions"] == marks(one)["conditions"]
    assert judge(None, two, "--plan", "--second", 0)[1].count("0 calls")  # it has its own copy
    for folder in (one, two):
        assert len((folder / "verdicts.jsonl").read_text().splitlines()) == 5
    judge(server, two, "--yes", "--second", 0, "--request", "max_tokens=9")
    assert len(server.seen) == 10


def test_no_endpoint_is_needed_where_nothing_is_asked(serve, judge, tmp_path) -> None:
    folder = open_run(tmp_path)
    judge(serve(), folder, *QUICK)
    (folder / "judged.json").unlink()
    assert judge(None, folder, "--second", 0)[0] == 0
    assert marks(folder)["conditions"]["both"]["accuracy"] == pytest.approx(0.6)
    code, _, err = judge(None, folder, "--second", 1, "--yes")
    assert (code, "no judge is named" in err) == (2, True)


def test_a_reply_in_parts(serve, judge, tmp_path) -> None:
    folder = open_run(tmp_path)

    def parts(number: int, body: dict) -> dict:
        first, rest = (word := fair(number, body))[:3], word[3:]
        texts = [{"type": "text", "text": first}, {"type": "text", "text": rest}]
        return (200, completion([{"type": "thinking", "thinking": []}, "?", *texts]))

    assert judge(serve(parts), folder, *QUICK)[0] == 0
    found = marks(folder)["conditions"]["both"]
    assert (found["unparsable"], found["accuracy"]) == (0, pytest.approx(0.6))


def test_a_reply_that_was_spent_on_thoughts_is_asked_again(serve, judge, tmp_path) -> None:
    """Empty with finish_reason length: unparsable now, not kept. Empty for another reason: kept."""
    folder = open_run(tmp_path)

    def choice(reason: str) -> tuple:
        message = {"role": "assistant", "content": None}
        return (200, completion("", choices=[{"message": message, "finish_reason": reason}]))

    ends = {0: "length", 1: "stop"}
    server = serve(lambda n, body: choice(ends[n]) if n in ends else fair(n, body))
    assert judge(server, folder, *QUICK)[0] == 0
    assert marks(folder)["conditions"]["both"]["unparsable"] == 2
    assert marks(folder)["tokens"]["in"] == 500
    assert len((folder / "verdicts.jsonl").read_text().splitlines()) == 4
    assert judge(server, folder, *QUICK)[0] == 0
    assert len(server.seen) == 6
    assert marks(folder)["conditions"]["both"]["unparsable"] == 1
    refuses = serve(
        lambda n, body: fair(n, body) if n == 0 else (401, {}) if n > 1 else choice("length")
    )
    code, _, err = judge(refuses, open_run(tmp_path, "b"), *QUICK)
    assert (code, "1 of 5 replies are kept" in err) == (2, True)


def test_a_local_run_by_party(serve, judge, tmp_path) -> None:
    folder = open_run(tmp_path, method="local", parties=("clinic", "archive"))
    judge(serve(), folder, "--yes")
    found = marks(folder)["conditions"]["both"]
    assert set(found["per_party"]) == {"clinic", "archive"}
    assert (found["n"], found["accuracy"]) == (10, pytest.approx(0.6))


def test_unparsable_verdicts_are_counted(serve, judge, tmp_path) -> None:
    folder = open_run(tmp_path)

    def unsure(number: int, body: dict) -> object:
        question = asked(body)["question"]
        if question == "Is it large?":
            return "It depends."
        return completion(None) if question == "Which organ?" else fair(number, body)

    code, out, _ = judge(serve(unsure), folder, "--yes", "--second", 5)
    assert code == 0
    assert "2 verdicts unparsable" in out
    found = marks(folder)["conditions"]["both"]
    assert (found["accuracy"], found["least"], found["most"]) == (pytest.approx(2 / 3), 0.4, 0.8)
    assert marks(folder)["second"]["read"] == 3


def test_test_conditions(serve, judge, tmp_path) -> None:
    folder, server = open_run(tmp_path, conditions=("both", "image_withheld")), serve()
    judge(server, folder, "--yes", "--second", 0)
    assert list(marks(folder)["conditions"]) == ["both"]
    judge(server, folder, "--yes", "--second", 0, "--condition", "image_withheld")
    assert list(marks(folder)["conditions"]) == ["image_withheld"]
    assert len(server.seen) == 5  # the same answers: the same verdicts
    code, _, err = judge(server, folder, "--yes", "--condition", "neither")
    assert (code, "was not tested under neither" in err) == (2, True)
    code, _, err = judge(server, folder, "--yes", "--condition", "nothing")
    assert (code, "unknown test condition 'nothing'" in err) == (2, True)


def test_the_estimate_comes_first(serve, judge, tmp_path, monkeypatch) -> None:
    folder, server = open_run(tmp_path), serve()
    code, out, _ = judge(None, folder, "--plan", "--price-in", 1000, "--price-out", 10_000)
    assert code == 0
    assert "5 answers of 1 result; 10 calls to judge-1" in out
    tokens = int(out.split("about ")[1].split(" tokens")[0].replace(",", ""))
    assert f"{tokens * 1000 / 1e6 + 0.3:.2f}, at most {tokens * 1000 / 1e6 + 6.4:.2f}" in out
    code, _, err = judge(server, folder)
    assert code == 2
    assert "give --yes" in err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda _: False)
    code, out, _ = judge(server, folder)
    assert (code, "nothing was asked" in out) == (1, True)
    assert server.seen == []
    monkeypatch.setattr("typer.confirm", lambda _: True)
    assert judge(server, folder)[0] == 0
    assert len(server.seen) == 10


# -- faults ------------------------------------------------------------------------------------

QUICK = ("--yes", "--second", 0, "--concurrency", 1)


@pytest.fixture
def hurry(monkeypatch):
    """Waits between tries are thousandths of a second."""
    monkeypatch.setattr("fedmllm.judge.endpoint.LONGEST_WAIT", 0.002)


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "1"}),
        (500, b"<html>oops</html>"),
        (503, b""),
        (200, b"{no json"),
        (200, b"[]"),
        (200, completion("x", choices=[])),
        (200, completion("x", choices=["x"])),
        "drop",
    ],
    ids=["429", "500", "503", "no-json", "list", "no-choice", "odd-choice", "drop"],
)
def test_a_fault_that_passes_costs_nothing(serve, judge, tmp_path, hurry, fault) -> None:
    folder = open_run(tmp_path)
    server = serve(lambda n, body: fault if n in (1, 2) else fair(n, body))
    code, _, err = judge(server, folder, *QUICK)
    assert (code, err) == (0, "")
    assert len(server.seen) == 7
    assert marks(folder)["conditions"]["both"]["accuracy"] == pytest.approx(0.6)


def test_slow_answers_are_given_up_and_asked_for_again(serve, judge, tmp_path, hurry) -> None:
    folder = open_run(tmp_path)
    server = serve(lambda n, body: 1.5 if n == 0 else fair(n, body))
    assert judge(server, folder, *QUICK, "--timeout", 0.3)[0] == 0
    assert len(server.seen) == 6
    assert marks(folder)["conditions"]["both"]["accuracy"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((500, b"oops"), "no answer after 3 tries: it answered with status 500: oops"),
        ((200, b"oops"), "after 3 tries: its reply is no chat completion"),
        ("drop", "after 3 tries: the connection failed"),
    ],
)
def test_a_fault_that_stays_ends_it_and_keeps_what_was_answered(
    serve, judge, tmp_path, hurry, fault, words
) -> None:
    folder = open_run(tmp_path)
    server = serve(lambda n, body: fair(n, body) if n < 2 else fault)
    code, _, err = judge(server, folder, *QUICK, "--retries", 2)
    assert code == 2
    assert words in err
    assert "2 of 5 replies are kept" in err
    assert "Traceback" not in err
    assert len(server.seen) == 5
    assert not (folder / "judged.json").exists()
    server.behave = fair
    assert judge(server, folder, *QUICK)[0] == 0
    assert len(server.seen) == 8


def test_a_refusal_is_told_at_once_without_the_key(serve, judge, tmp_path) -> None:
    said = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}
    server = serve(lambda n, body: (401, said))
    code, out, err = judge(server, open_run(tmp_path), *QUICK)
    assert code == 2
    assert "the judge refuses: status 401: Incorrect API key provided: …" in err
    assert KEY not in out + err
    assert len(server.seen) == 1


@pytest.mark.parametrize("before", range(170, 201, 3))
def test_a_key_that_a_message_is_cut_in_is_hidden(serve, before) -> None:
    """A message is cut at 200 characters; the key stands across that place."""
    server = serve(lambda n, body: (401, {"error": {"message": "x" * before + f" {KEY} again"}}))
    asking = Judge(Endpoint(server.url + "/chat/completions", KEY), {})
    with pytest.raises(UserError) as caught:
        asking.ask("s", "m")
    asking.close()
    assert "sk-" not in str(caught.value)
    assert "xxx" in str(caught.value)


def test_parts_of_a_key_are_hidden(serve) -> None:
    key = "sk-proj-0123456789abcdefWXYZ"
    said = ["sk-proj-0123456789", "'sk-proj-****WXYZ'", "(ends in WXYZ)", f"{key[:-1]}"]
    server = serve(lambda n, body: (401, {"error": {"message": said[n]}}))
    asking = Judge(Endpoint(server.url + "/chat/completions", key), {})
    for _ in said:
        with pytest.raises(UserError) as caught:
            asking.ask("s", "m")
        assert "…" in str(caught.value)
        assert not any(part in str(caught.value) for part in ("sk-proj", "0123", "WXYZ"))
    asking.close()
    short = Judge(Endpoint(server.url + "/chat/completions", "abcdefgh-status"), {})
    server.behave = lambda n, body: (401, {"error": {"message": "abcdefgh is no status"}})
    with pytest.raises(UserError, match="status 401: abcdefgh is no status"):
        short.ask("s", "m")
    short.close()


def test_a_reply_that_holds_the_key_is_kept_without_it(serve, judge, tmp_path) -> None:
    folder = open_run(tmp_path)
    echo = f"{KEY} and {KEY[:12]}, at SERVER:\nCORRECT"
    server = serve()
    text = echo.replace("SERVER", server.url)
    server.behave = lambda n, body: (200, completion(text, model=f"m-{KEY}"))
    assert judge(server, folder, *QUICK)[0] == 0
    for file in folder.iterdir():
        assert "sk-a-sec" not in file.read_text()
        assert "127.0.0.1" not in file.read_text()
    assert marks(folder)["conditions"]["both"]["correct"] == 5
    assert marks(folder)["served"] == {"m-…": 5}


def test_a_dummy_key_spoils_no_reply(serve) -> None:
    server = serve(lambda n, body: "CORRECT")
    asking = Judge(Endpoint(server.url + "/chat/completions", "R"), {})
    assert asking.ask("s", "m").text == "CORRECT"
    asking.close()


def test_halves_of_letters_are_no_fault(serve, judge, tmp_path) -> None:
    """JSON can hold half a surrogate pair, UTF-8 cannot: in an answer and in a model's name."""
    rows = (("open", "which?", "a", "a\ud83d"), ("open", "what?", "b", "b"))
    folder = open_run(tmp_path, rows=rows)
    server = serve(lambda n, body: (200, completion("CORRECT\n\udc00", model="m\ud800")))
    assert judge(None, folder, "--plan")[0] == 0
    code, _, err = judge(server, folder, *QUICK)
    assert (code, err) == (0, "")
    assert {asked(body)["given answer"] for body in server.seen} == {"a\ud83d", "b"}
    assert marks(folder)["served"] == {"m?": 2}
    path = write_judged(tmp_path, {"served": {"m\ud800": 1}})  # kept by an older version
    data = json.loads(path.read_text())
    assert data["served"] == {"m\ud800": 1}
    assert data["judged_sha256"] == judged_digest(data)


def test_progress_counts_what_was_asked(tmp_path) -> None:
    """While one request fails, the other thread goes through all that is left without asking."""
    rows = tuple(("open", f"question {i}", "a", "a") for i in range(30))
    found, _ = load_results([open_run(tmp_path, rows=rows)])
    work, _ = make_work(found, Scheme("m", {}, second=0))

    class Slow(threading.Event):
        def set(self) -> None:
            super().set()
            time.sleep(0.3)

    class Failing:
        stopped, lock, calls = Slow(), threading.Lock(), 0

        def ask(self, system: str, message: str) -> Reply:
            with self.lock:
                self.calls += 1
                number = self.calls
            if number == 3:
                raise UserError("no more")
            return Reply("CORRECT")

    judge, told = Failing(), [0]
    with pytest.raises(UserError, match="no more"):
        ask_all(work, judge, concurrency=2, told=told.append)
    assert told[-1] <= judge.calls - 1
    assert told == list(range(len(told)))


def test_a_redirection_is_not_followed_with_the_key(serve, judge, tmp_path) -> None:
    other = serve()
    server = serve(lambda n, body: (307, b"", {"Location": other.url + "/chat/completions"}))
    code, _, err = judge(server, open_run(tmp_path), *QUICK)
    assert (code, "refuses: status 307" in err) == (2, True)
    assert other.seen == []


def test_nobody_listens(judge, serve, tmp_path, hurry) -> None:
    server = serve()
    server.close()
    server._server.shutdown = server._server.server_close = lambda: None
    code, _, err = judge(server, open_run(tmp_path), *QUICK, "--retries", 1)
    assert code == 2
    assert "after 2 tries: the connection failed (ConnectError" in err
    assert "127.0.0.1" not in err


def test_a_filtered_question_is_unparsable_and_not_the_end(serve, judge, tmp_path) -> None:
    blocked = (400, {"error": {"code": "content_filter", "message": "no"}})
    server = serve(lambda n, body: blocked if n == 1 else fair(n, body))
    folder = open_run(tmp_path)
    assert judge(server, folder, *QUICK)[0] == 0
    assert marks(folder)["conditions"]["both"]["unparsable"] == 1
    plain = serve(lambda n, body: (400, {"error": {"message": "unknown field", "code": "x"}}))
    code, _, err = judge(plain, open_run(tmp_path, "b"), *QUICK, "--request", "a=1")
    assert (code, "status 400: unknown field" in err) == (2, True)


def test_the_waits_double_and_heed_the_server(serve, monkeypatch) -> None:
    waits: list[float] = []
    fault = (429, b"", {"Retry-After": "7"})
    server = serve(lambda n, body: (503, b"") if n != 2 else fault)
    asking = Judge(Endpoint(server.url + "/chat/completions"), {"model": "m"}, retries=4)
    monkeypatch.setattr(asking.stopped, "wait", lambda s: waits.append(s))
    with pytest.raises(UserError, match="after 5 tries"):
        asking.ask("s", "m")
    asking.close()
    assert [0.75 <= w / expected <= 1.25 for w, expected in zip(waits, (1, 2, 7, 8), strict=True)]
    assert waits[2] == 7.0
    assert server.keys == [None] * 5  # no key: no header


def test_several_at_a_time(serve, judge, tmp_path) -> None:
    rows = tuple(("open", f"question {i}", "a", "a") for i in range(12))
    server = serve(lambda n, body: 0.05)
    assert judge(server, open_run(tmp_path, rows=rows), "--yes", "--concurrency", 3)[0] == 0
    assert 2 <= server.most <= 3


SLOW = """
import sys
from fedmllm.cli import main
sys.argv = ["fedmllm", "judge", sys.argv[1], "--model", "judge-1", "--yes", "--second", "0",
            "--concurrency", "2"]
main()
"""


def test_a_killed_judge_goes_on(serve, judge, tmp_path) -> None:
    """SIGKILL while twelve answers are judged: each is asked once in all, but for those that were
    under way."""
    rows = tuple(("open", f"question {i}", "a", "a") for i in range(12))
    folder = open_run(tmp_path, rows=rows)
    server = serve(lambda n, body: 0.02 if n < 4 else 20.0)
    environment = {**os.environ, "FEDMLLM_JUDGE_URL": server.url}
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder)], env=environment)
    kept = folder / "verdicts.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (
        kept.exists() and kept.read_text().count("\n") == 4 and len(server.seen) == 6
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with kept.open("a") as file:  # a line that the kill cut
        file.write('{"key": "ab')
    server.behave = lambda n, body: "CORRECT"
    assert judge(server, folder, "--yes", "--second", 0)[0] == 0
    assert len(server.seen) == 6 + 8
    assert marks(folder)["conditions"]["both"]["correct"] == 12
    assert judge(None, folder, "--plan", "--second", 0)[1].count("; 0 calls")


def test_a_cut_line_spoils_no_other(tmp_path) -> None:
    first = Verdicts()
    first.read(tmp_path)
    first.keep(tmp_path, "a", Reply("CORRECT"))
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write('{"key": "b", "te')
    second = Verdicts()
    second.read(tmp_path)
    second.keep(tmp_path, "c", Reply("INCORRECT", "m", 3, 1))
    third = Verdicts()
    third.read(tmp_path)
    assert third.known == {"a": Reply("CORRECT"), "c": Reply("INCORRECT", "m", 3, 1)}


# -- what cannot be judged ---------------------------------------------------------------------


def test_answers_that_are_not_those_of_the_result(serve, judge, tmp_path) -> None:
    folder, server = open_run(tmp_path), serve()
    file = folder / "answers.jsonl"
    file.write_text(file.read_text().replace("nothing", "a fracture"))
    code, _, err = judge(server, folder, "--yes")
    assert (code, "is not what its result.json states" in err) == (2, True)
    assert server.seen == []


def test_answers_that_were_changed_keep_no_others_from_being_judged(tmp_path) -> None:
    bad, good = open_run(tmp_path, "bad"), open_run(tmp_path, "good")
    (bad / "answers.jsonl").write_text("")
    found, _ = load_results([tmp_path])
    work, problems = make_work(found, Scheme("m", {}, second=0))
    assert [job.folder for job in work.jobs] == [good]
    assert len(problems) == 1
    assert "is not what its result.json states" in problems[0]


def test_what_many_lack_is_said_once(tmp_path) -> None:
    write(tmp_path, [result("fedavg", "aligned-a0.5", seed) for seed in range(5)])
    open_run(tmp_path, "good")
    _, (problem,) = make_work(load_results([tmp_path])[0], Scheme("m", {}, second=0))
    first = tmp_path / "memes-aligned-a0.5-fedavg-plain-s0" / "result.json"
    assert problem == f"{first} and 4 others: its answers are letters: there is nothing to judge"


@pytest.mark.parametrize("name", ["answers.jsonl", "verdicts.jsonl"])
def test_a_folder_in_place_of_a_file_is_told(serve, judge, tmp_path, name) -> None:
    folder, server = open_run(tmp_path), serve()
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    code, _, err = judge(server, folder, "--yes")
    assert code == 2
    assert f"{name}: cannot be read: Is a directory" in err
    assert server.seen == []


def test_marks_that_nobody_would_read_are_not_made(serve, judge, tmp_path) -> None:
    folder, server = open_run(tmp_path), serve()
    (folder / "result.json").rename(folder / "other.json")
    code, _, err = judge(server, folder / "other.json", "--yes")
    assert (code, "is not named result.json" in err) == (2, True)
    assert not (folder / "judged.json").exists()
    assert server.seen == []


def test_results_without_open_answers_are_named(serve, judge, tmp_path) -> None:
    write(tmp_path, [result("fedavg", "aligned-a0.5", 0)])
    old = open_run(tmp_path, "old")
    (old / "answers.jsonl").unlink()
    code, _, err = judge(serve(), tmp_path, "--yes")
    assert code == 2
    assert "there is nothing to judge" in err
    assert "its answers are letters" in err
    assert "answers.jsonl is not beside it" in err
    open_run(tmp_path, "new")
    code, out, _ = judge(serve(), tmp_path, "--yes")
    assert (code, "answers.jsonl is not beside it" in out) == (0, True)


# -- the run keeps its answers -----------------------------------------------------------------


def small(**more) -> dict:
    return {
        "name": "kept",
        "data": {"name": "medical", "train": 12, "test": 6, "flashcards": 8},
        "partition": {"clients": 2},
        "training": {"rounds": 1},
        "evaluation": {"every": 0, "conditions": ["both", "image_withheld"]},
        **more,
    }


def test_a_run_keeps_its_answers_to_open_questions(mllm, tmp_path) -> None:
    folder = tmp_path / "kept"
    found = run(make_config(small(topology="local")), out=folder, mllm=mllm)
    content = (folder / "answers.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == found["answers_sha256"]
    lines = [json.loads(line) for line in content.splitlines()]
    parties = ["client-00", "client-01"]
    assert list(dict.fromkeys(line["federation"] for line in lines)) == parties
    assert len(lines) == 2 * 2 * 6
    (loaded,), problems = load_results([folder])
    assert problems == []
    work, _ = make_work([loaded], Scheme("m", {}, second=0), ["image_withheld"])
    items = work.jobs[0].items
    for party in parties:  # the file says what the metrics were computed from
        own = [i for i in items if i.federation == party]
        exact = scores(own, [None] * len(own))["exact_match"]
        assert exact == found["per_client"][party]["image_withheld"]["accuracy"]
    again = run(make_config(small(topology="local")), out=folder, overwrite=True, mllm=mllm)
    assert again["answers_sha256"] == found["answers_sha256"]


def test_a_choice_task_has_no_answers_to_keep(mllm, tmp_path) -> None:
    data = {"name": "memes", "train": 16, "test": 8}
    found = run(make_config(small(data=data)), out=tmp_path / "kept", mllm=mllm)
    assert "answers_sha256" not in found
    assert not (tmp_path / "kept" / "answers.jsonl").exists()


# -- the report --------------------------------------------------------------------------------


@pytest.fixture
def judged(serve, judge, tmp_path) -> Path:
    """Two judged runs and one that is not."""
    open_run(tmp_path, "one")
    open_run(tmp_path, "two", seed=1, rows=QUESTIONS[:4])
    judge(serve(), tmp_path, "--yes")
    open_run(tmp_path, "three", method="fedyogi")
    return tmp_path


def test_judged_accuracy_stands_beside_exact_match(judged) -> None:
    found, problems = load_results([judged])
    assert problems == []
    text = markdown_table(found)
    assert "| judged, image + text |" in text
    assert "| 0.600 ± 0.219 |" in text
    assert r"accuracy by judge-1 (" in text
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(csv_table(found)))}
    assert float(rows["two"]["judged_both"]) == 0.75
    assert rows["three"]["judged_both"] == rows["three"]["judge"] == ""
    assert rows["one"]["judged_both_unparsable"] == "0"
    page = write_report(found, judged / "report.html").read_text()
    assert "Judged by a language model" in page
    assert "0.600 ± 0.219" in page
    assert "judged" not in markdown_table([r for r in found if r["name"] == "three"]).lower()


def test_judged_means_over_seeds(judged, tmp_path) -> None:
    found, _ = load_results([judged])
    exact, marked = grid_tables(found)[0]
    assert exact.judge == ""
    assert set(exact.cells) == {"FedAvg", "FedYogi"}
    assert set(marked.cells) == {"FedAvg"}
    cell = marked.cells["FedAvg"]["aligned-a0.5"]
    assert (cell.mean, cell.seeds) == (pytest.approx(0.675), 2)
    assert note(marked).startswith("Accuracy judged by judge-1 (")
    assert "could not be read, and do not count: 0." in note(marked)
    assert "judged by judge-1 (" in markdown_grid([exact, marked])
    for name in ("t.html", "t.tex", "t.csv", "t.md"):
        assert "judge-1" in write_tables(found, tmp_path / name, title="t").read_text()


def test_a_judges_means_name_the_file_of_its_marks(judged, tmp_path) -> None:
    found, _ = load_results([judged])
    exact, marked = grid_tables(found)[0]
    assert {Path(f).name for f in exact.cells["FedAvg"]["aligned-a0.5"].files} == {"result.json"}
    files = marked.cells["FedAvg"]["aligned-a0.5"].files
    assert [Path(f).relative_to(judged).as_posix() for f in files] == [
        "one/judged.json",
        "two/judged.json",
    ]
    grid = write_tables(found, judged / "grid.html", title="t").read_text()
    assert 'title="2 files:&#10;one/judged.json&#10;two/judged.json"' in grid
    assert '<a href="two/judged.json">judged.json</a>' in grid
    few = write_tables(found, judged / "few.html", title="t", per_run=True).read_text()
    assert few.count('<a href="one/judged.json">judged.json</a>') == 3  # its row, its marks, files
    assert "three/judged.json" not in grid + few


def test_marks_of_two_judges_are_not_averaged(serve, judge, judged) -> None:
    judge(serve(), judged / "two", "--yes", "--request", "max_tokens=9")
    tables = grid_tables(load_results([judged])[0])[0]
    assert [bool(t.judge) for t in tables] == [False, True, True]
    assert [c.seeds for t in tables[1:] for row in t.cells.values() for c in row.values()] == [1, 1]


def test_marks_of_two_served_models_are_not_averaged(serve, judge, tmp_path) -> None:
    """The same name at the endpoint, another model behind it from the second result on."""
    for seed in range(3):
        rows = tuple((kind, f"{question} {seed}", *rest) for kind, question, *rest in QUESTIONS)
        folder = open_run(tmp_path, str(seed), seed=seed, rows=rows)
        model = "judge-a" if seed == 0 else "judge-b"
        first = (400, {"error": {"code": "content_filter"}})  # names no model: makes no difference

        def behave(n: int, body: dict, model: str = model, first: object = first, seed: int = seed):
            return first if n == seed == 1 else (200, completion(fair(n, body), model=model))

        judge(serve(behave), folder, *QUICK)
    found = sorted(load_results([tmp_path])[0], key=lambda r: r["seed"])
    assert found[1]["_judged"]["served"] == {"judge-b": 4, "": 1}
    names = [judge_of(r) for r in found]
    assert names[0] != names[1] == names[2]
    assert not any("served" in name for name in names)
    tables = grid_tables(found)[0]
    seeds = [c.seeds for t in tables if t.judge for row in t.cells.values() for c in row.values()]
    assert sorted(seeds) == [1, 2]


def test_several_models_behind_one_result_are_named(serve, judge, tmp_path) -> None:
    server = serve(lambda n, body: (200, completion("CORRECT", model=f"judge-{'ba'[n % 2]}")))
    judge(server, open_run(tmp_path), *QUICK)
    found, _ = load_results([tmp_path])
    assert "; served by judge-a, judge-b)" in judge_of(found[0])
    assert "served by judge-a, judge-b" in markdown_table(found)


def test_marks_of_another_result_are_named_and_left_out(judged) -> None:
    (judged / "three" / "judged.json").write_bytes((judged / "one" / "judged.json").read_bytes())
    changed = marks(judged / "one")
    changed["conditions"]["both"]["accuracy"] = 0.9
    (judged / "one" / "judged.json").write_text(json.dumps(changed))
    (judged / "two" / "judged.json").write_text("{")
    found, problems = load_results([judged])
    assert len(found) == 3
    assert not any(r["_judged"] for r in found)
    assert "one/judged.json: was changed after it was written" in problems[0]
    assert "three/judged.json: belongs to another result" in problems[1]
    assert "two/judged.json: is not valid JSON" in problems[2]
    changed["judged_sha256"] = judged_digest(changed)
    assert changed["result_sha256"] == found[0]["result_sha256"]
