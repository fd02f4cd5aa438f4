"""A small chat server on this machine, well-behaved or not, and runs with open answers for it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from synthetic_grid import result

from fedmllm.report.loading import result_digest

Behaviour = Callable[[int, dict[str, Any]], Any]
"""(number of the request from 0, its body) -> a reply's text, (status, body), "drop" or a wait"""


def completion(text: Any, **more: Any) -> dict[str, Any]:
    return {
        "model": "judge-2026-01",
        "choices": [{"message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 2},
        **more,
    }


def asked(body: dict[str, Any]) -> dict[str, str]:
    """What was put before the judge."""
    return json.loads(body["messages"][1]["content"])


def fair(_: int, body: dict[str, Any]) -> str:
    """Marks by the first letter."""
    facts = asked(body)
    return "CORRECT" if facts["given answer"][:1] == facts["expected answer"][:1] else "INCORRECT"


class Server:
    """Listens until `close`. seen: the bodies in order; keys: the Authorization headers."""

    def __init__(self, behave: Behaviour = fair) -> None:
        self.behave, self.seen, self.keys, self.paths = behave, [], [], []
        self.busy = self.most = 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.seen)
                    outer.seen.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.paths.append(self.path)
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                try:
                    self.answer(outer.behave(number, body))
                except BrokenPipeError:
                    pass
                finally:
                    with lock:
                        outer.busy -= 1

            def answer(self, found: Any) -> None:
                if found == "drop":  # half of what was promised
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                    return
                if isinstance(found, float):
                    time.sleep(found)
                    found = "CORRECT"
                status, reply, headers = 200, found, {}
                if isinstance(found, tuple):
                    status, reply, *rest = found
                    headers = rest[0] if rest else {}
                if isinstance(reply, str):
                    reply = completion(reply)
                text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


QUESTIONS = (  # kind, question, expected, given
    ("closed", "Is it broken?", "yes", "yes"),
    ("closed", "Is it large?", "no", "yes"),
    ("open", "Which organ?", "left lung", "lung on the left"),  # another wording of the same
    ("open", "Which plane?", "axial", "axial"),
    ("open", "What is here?", "a fracture", "nothing"),
)


def open_run(
    folder: Path,
    name: str = "medical-fedavg",
    *,
    method: str = "fedavg",
    seed: int = 0,
    rows: tuple[tuple[str, str, str, str], ...] = QUESTIONS,
    conditions: tuple[str, ...] = ("both",),
    parties: tuple[str, ...] = ("",),
) -> Path:
    """A run folder with a result of an open task and its answers; nothing in it was measured."""
    made = result(method, "aligned-a0.5", seed, task="medical")
    made["name"] = name
    made["task"] = {"name": "medical", "kind": "open", "metric": "accuracy", "classes": []}
    made["metrics"] = {c: {"n": len(rows), "accuracy": 0.4, "accuracy_se": 0.2} for c in conditions}
    made["history"], made["spread"] = [], {}
    lines = [
        {
            "federation": party,
            "condition": condition,
            "id": f"q{i}",
            "kind": kind,
            "question": question,
            "expected": expected,
            "given": given,
        }
        for party in parties
        for condition in conditions
        for i, (kind, question, expected, given) in enumerate(rows)
    ]
    place = folder / name
    place.mkdir(parents=True)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (place / "answers.jsonl").write_bytes(content)
    made["answers_sha256"] = hashlib.sha256(content).hexdigest()
    made["result_sha256"] = result_digest(made)
    (place / "result.json").write_text(json.dumps(made))
    return place
