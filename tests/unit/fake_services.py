"""Services beside OpenAI's own on this machine, with the fields and states that their published documents have.

FakeTogether is Together AI's API of fine-tuning jobs (its OpenAPI document of April 2026): a field that the document
does not have, or one of another kind, is an error. FakeAzure is Azure's (2024-10-21): OpenAI's paths, with states of
its own and fewer fields in its answers.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tests.unit.fake_openai import FakeOpenAI, error

JOB_FIELDS: dict[str, Any] = {
    "training_file": str, "validation_file": str, "packing": bool, "max_seq_length": int, "model": str,
    "n_epochs": int, "n_checkpoints": int, "n_evals": int, "batch_size": (int, str), "learning_rate": float,
    "lr_scheduler": dict, "warmup_ratio": float, "max_grad_norm": float, "weight_decay": float, "random_seed": int,
    "suffix": str, "wandb_api_key": str, "wandb_base_url": str, "wandb_project_name": str, "wandb_name": str,
    "wandb_entity": str, "train_on_inputs": (bool, str), "training_method": dict, "training_type": dict,
    "multimodal_params": dict, "from_checkpoint": str, "from_hf_model": str, "hf_model_revision": str,
    "hf_api_token": str, "hf_output_repo_name": str,
}
METHOD_FIELDS = {"method": str, "train_on_inputs": bool}  # both required
LORA_FIELDS = {"type": str, "lora_r": int, "lora_alpha": int}  # all required
TOGETHER_STATES = {
    "validating_files": "pending", "queued": "queued", "running": "running", "succeeded": "completed",
    "failed": "error", "cancelled": "cancelled",
}
AZURE_JOB = (
    "id", "object", "status", "model", "training_file", "created_at", "hyperparameters", "fine_tuned_model", "error",
)


def wrong_fields(body: dict[str, Any], fields: dict[str, Any], required: tuple[str, ...]) -> list[str]:
    wrong = [name for name, value in body.items() if name not in fields or not isinstance(value, fields[name])]
    return wrong + [name for name in required if name not in body]


class FakeTogether(FakeOpenAI):
    """Answers chat as OpenAI does. `jobs` holds them by OpenAI's names, and `bodies` what was asked for."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.bodies: list[dict[str, Any]] = []

    def act(self, route: str, query: dict[str, str], body: bytes, kind: str) -> tuple[int, dict[str, Any]]:
        if route == "POST /files/upload":
            status, file = self.add_file(body, kind)
            return status, self.as_file(file)
        if found := re.fullmatch(r"GET /files/([\w-]+)", route):
            status, file = self.one(self.files, found[1], hidden={"text"})
            return status, self.as_file(file) if status == 200 else file
        if route == "POST /fine-tunes":
            return self.add_fine_tune(json.loads(body))
        if route == "GET /fine-tunes":
            return 200, {"data": [self.as_job(job) for job in self.jobs.values()]}
        if found := re.fullmatch(r"GET /fine-tunes/([\w-]+)", route):
            if found[1] not in self.jobs:
                return error(404, f"no job {found[1]}")
            self.go_on(self.jobs[found[1]])
            return 200, self.as_job(self.jobs[found[1]])
        if found := re.fullmatch(r"GET /fine-tunes/([\w-]+)/events", route):
            return 200, {"data": [self.as_event(event) for event in self.events[found[1]]]}
        if found := re.fullmatch(r"GET /fine-tunes/([\w-]+)/metrics", route):
            data = [event["data"] for event in self.events[found[1]] if event["data"]]
            return 200, {"metrics": [
                {"train/loss": d["train_loss"], "train/learning_rate": 1e-4, "train/global_step": d["step"]}
                for d in data
            ]}
        return super().act(route, query, body, kind) if route == "POST /chat/completions" else error(404, route)

    def add_fine_tune(self, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        wrong = [
            *wrong_fields(wanted, JOB_FIELDS, ("training_file",)),
            *wrong_fields(wanted["training_method"], METHOD_FIELDS, tuple(METHOD_FIELDS)),
            *wrong_fields(wanted["training_type"], LORA_FIELDS, tuple(LORA_FIELDS)),
        ]
        if wrong or ("model" in wanted) == ("from_checkpoint" in wanted):
            return error(400, f"wrong fields: {wrong or 'model or from_checkpoint, not both'}")
        model = wanted.get("from_checkpoint") or wanted["model"]
        status, job = self.add_job({**wanted, "model": model, "seed": wanted["random_seed"], "hyperparameters": {}})
        if status == 200:
            self.bodies.append(wanted)
        return status, self.as_job(job) if status == 200 else job

    def as_file(self, file: dict[str, Any]) -> dict[str, Any]:
        kept = {name: file[name] for name in ("id", "object", "created_at", "filename", "bytes", "purpose")}
        return {**kept, "Processed": True, "FileType": "jsonl"}

    def as_job(self, job: dict[str, Any]) -> dict[str, Any]:
        done = {"model_output_name": job["fine_tuned_model"], "token_count": job["trained_tokens"]}
        return {
            "id": job["id"], "status": TOGETHER_STATES[job["status"]], "created_at": "2026-04-28T12:00:00.000Z",
            "updated_at": "2026-04-28T12:01:00.000Z", "training_file": job["training_file"], "model": job["model"],
            "events": [self.as_event(event) for event in self.events.get(job["id"], [])],
            **{name: value for name, value in done.items() if value is not None},
        }

    def as_event(self, event: dict[str, Any]) -> dict[str, Any]:
        message = "The loss exploded." if event["level"] == "error" else event["message"]
        return {
            "object": "fine-tune-event", "created_at": "2026-04-28T12:00:00.000Z", "level": event["level"],
            "message": message, "type": "training_start", "param_count": 0, "token_count": 0, "total_steps": 3,
            "wandb_url": "", "step": 0, "checkpoint_path": "", "model_path": "", "training_offset": 0,
            "hash": event["id"],
        }


class FakeAzure(FakeOpenAI):
    """A file is "pending" for a look, a job says what its document has alone, and events have no data."""

    def act(self, route: str, query: dict[str, str], body: bytes, kind: str) -> tuple[int, dict[str, Any]]:
        status, answer = super().act(route, query, body, kind)
        if status != 200:
            return status, answer
        if "/files" in route:
            answer = {**answer, "status": "pending" if route.startswith("POST") else "processed"}
        elif route.endswith("/events"):
            answer = {**answer, "data": [{k: v for k, v in e.items() if k != "data"} for e in answer["data"]]}
        elif route.startswith("GET /fine_tuning/jobs") and "data" in answer:
            answer = {**answer, "data": [self.as_job(job) for job in answer["data"]]}
        elif "/fine_tuning/jobs" in route:
            answer = self.as_job(answer)
        return (201 if route.startswith("POST /f") else 200), answer

    def as_job(self, job: dict[str, Any]) -> dict[str, Any]:
        status = {"validating_files": "pending"}.get(job["status"], job["status"])
        found = {**{name: job[name] for name in AZURE_JOB}, "status": status}
        return {name: value for name, value in found.items() if value is not None}
