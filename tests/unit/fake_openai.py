"""A service with OpenAI's API on this machine: files, fine-tuning jobs, their events, chat, and faults on demand.

    with FakeOpenAI(answer=lambda model, prompt: "42") as service:
        service.faults["POST /files"] = [429, "drop", "lose"]     # of the next requests, in turn
        service.outcomes = ["failed"]                             # of the next jobs, in turn; then they succeed

A fault is a status, "drop" (the connection closes and nothing happens), "lose" (it happens, and the connection closes
before the reply) or None. A job goes one status on with every look at it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

WAY = ("validating_files", "queued", "running")
STEPS = 3  # metrics events of a job


class FakeOpenAI:
    def __init__(self, key: str = "sk-secret", answer: Callable[[str, str], str] = lambda model, prompt: "an answer"):
        self.key, self.answer = key, answer
        self.files: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.faults: dict[str, list[Any]] = {}
        self.outcomes: list[str] = []
        self.requests: list[str] = []
        self.chats: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def __enter__(self) -> FakeOpenAI:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                service.handle(self, "GET")

            def do_POST(self):
                service.handle(self, "POST")

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def count(self, request: str) -> int:
        return self.requests.count(request)

    def uploaded(self, file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[file]["text"].splitlines()]

    def handle(self, http: BaseHTTPRequestHandler, method: str) -> None:
        url = urlsplit(http.path)
        body = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        route = f"{method} {url.path.removeprefix('/v1')}"
        with self.lock:
            self.requests.append(route)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            waiting = next(
                (faults for prefix, faults in self.faults.items() if route.startswith(prefix) and faults), []
            )
            fault = waiting.pop(0) if waiting else None
        try:
            self.reply(http, route, {k: v[0] for k, v in parse_qs(url.query).items()}, body, fault)
        finally:
            with self.lock:
                self.at_once -= 1

    def reply(self, http: BaseHTTPRequestHandler, route: str, query: dict[str, str], body: bytes, fault: Any) -> None:
        if fault == "drop":
            return
        if http.headers.get("Authorization") != f"Bearer {self.key}":
            status, answer = error(
                401, f"Incorrect API key provided: {http.headers.get('Authorization', '').removeprefix('Bearer ')}"
            )
        elif isinstance(fault, int):
            status, answer = error(
                fault, {429: "Rate limit reached", 402: "insufficient_quota"}.get(fault, "The server had an error")
            )
            if fault == 402:
                status, answer["error"]["code"] = 429, "insufficient_quota"
        else:
            with self.lock:
                status, answer = self.act(route, query, body, http.headers.get("Content-Type", ""))
        if fault == "lose":
            return
        data = json.dumps(answer).encode()
        http.send_response(status)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(data)))
        if fault == 429:
            http.send_header("Retry-After", "0")
        http.end_headers()
        http.wfile.write(data)

    def act(self, route: str, query: dict[str, str], body: bytes, kind: str) -> tuple[int, dict[str, Any]]:
        if route == "POST /files":
            return self.add_file(body, kind)
        if found := re.fullmatch(r"GET /files/([\w-]+)", route):
            return self.one(self.files, found[1], hidden={"text"})
        if route == "POST /fine_tuning/jobs":
            return self.add_job(json.loads(body))
        if route == "GET /fine_tuning/jobs":
            return page(list(self.jobs.values())[::-1], query)
        if found := re.fullmatch(r"GET /fine_tuning/jobs/([\w-]+)", route):
            if found[1] in self.jobs:
                self.go_on(self.jobs[found[1]])
            return self.one(self.jobs, found[1])
        if found := re.fullmatch(r"GET /fine_tuning/jobs/([\w-]+)/events", route):
            return page(self.events.get(found[1], [])[::-1], query)
        if route == "POST /chat/completions":
            return self.chat(json.loads(body))
        return error(404, f"no route {route}")

    def one(
        self, things: dict[str, dict[str, Any]], name: str, hidden: set[str] = frozenset()
    ) -> tuple[int, dict[str, Any]]:
        if name not in things:
            return error(404, f"No such object: {name}")
        return 200, {k: v for k, v in things[name].items() if k not in hidden}

    def add_file(self, body: bytes, kind: str) -> tuple[int, dict[str, Any]]:
        mark = b"--" + re.search(r'boundary="?([^";]+)', kind)[1].encode()
        parts = [part.partition(b"\r\n\r\n") for part in body.split(mark)]
        fields = {
            re.search(rb'name="(\w+)"', head)[1].decode(): (head, data.removesuffix(b"\r\n"))
            for head, _, data in parts
            if b"name=" in head
        }
        name = f"file-{len(self.files)}"
        self.files[name] = {
            "id": name, "object": "file", "bytes": len(fields["file"][1]), "created_at": 1,
            "purpose": fields["purpose"][1].decode(), "status": "processed",
            "filename": re.search(rb'filename="([^"]+)"', fields["file"][0])[1].decode(),
            "text": fields["file"][1].decode(),
        }
        return self.one(self.files, name, hidden={"text"})

    def add_job(self, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if wanted["training_file"] not in self.files:
            return error(400, f"invalid training_file: {wanted['training_file']}")
        if wanted["model"].startswith("ft:") and wanted["model"] not in [
            j["fine_tuned_model"] for j in self.jobs.values()
        ]:
            return error(404, f"The model {wanted['model']} does not exist")
        name = f"ftjob-{len(self.jobs)}"
        self.jobs[name] = {
            "object": "fine_tuning.job", "id": name, "created_at": 100, "finished_at": None, "status": WAY[0],
            "fine_tuned_model": None, "error": None, "organization_id": "org", "result_files": [],
            "trained_tokens": None, "validation_file": None, "user_provided_suffix": wanted.get("suffix"),
            **{k: wanted[k] for k in ("model", "training_file", "seed", "hyperparameters")},
            "outcome": self.outcomes.pop(0) if self.outcomes else "succeeded",
        }
        self.happen(name, "Created fine-tuning job")
        return 200, self.jobs[name]

    def go_on(self, job: dict[str, Any]) -> None:
        """One status further."""
        if job["status"] not in WAY:
            return
        at = WAY.index(job["status"])
        if at + 1 < len(WAY):
            job["status"] = WAY[at + 1]
            return self.happen(job["id"], f"Job is {job['status']}")
        job["status"] = job["outcome"]
        if job["outcome"] != "succeeded":
            job["error"] = (
                {"code": "bad", "message": "The loss exploded.", "param": None} if job["outcome"] == "failed" else None
            )
            return self.happen(job["id"], "The job did not complete", level="error")
        for step in range(1, STEPS + 1):
            self.happen(
                job["id"], f"Step {step}/{STEPS}", type="metrics",
                data={"step": step, "total_steps": STEPS, "train_loss": 1 / step},
            )
        job.update(
            finished_at=160, trained_tokens=1000, fine_tuned_model=f"ft:{job['id']}:{job['user_provided_suffix']}"
        )
        return self.happen(job["id"], "The job has successfully completed")

    def happen(self, job: str, message: str, **facts: Any) -> None:
        events = self.events.setdefault(job, [])
        events.append(
            {
                "object": "fine_tuning.job.event", "id": f"ftevent-{job}-{len(events)}", "created_at": 1,
                "level": "info", "message": message, "type": "message", "data": {}, **facts,
            }
        )

    def chat(self, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.chats.append(wanted)
        prompt = wanted["messages"][0]["content"]
        text = self.answer(wanted["model"], prompt)
        usage = {
            "prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split()),
            "total_tokens": len(prompt.split()) + len(text.split()),
        }
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return 200, {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": wanted["model"],
            "choices": [choice], "usage": usage,
        }


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "error", "param": None, "code": None}}


def page(newest_first: list[dict[str, Any]], query: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """One page of a listing, two things long at most, so that clients have to turn it."""
    ids = [thing["id"] for thing in newest_first]
    start = ids.index(query["after"]) + 1 if "after" in query else 0
    shown = newest_first[start : start + min(2, int(query.get("limit", 2)))]
    return 200, {"object": "list", "data": shown, "has_more": start + len(shown) < len(newest_first)}
