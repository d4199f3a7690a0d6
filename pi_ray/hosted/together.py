"""Together AI's API for fine-tuning jobs (`closed.jobs: together`), as its OpenAPI document of April 2026 has it.

Files, jobs and events have paths, fields and states of their own; answers come by the same API as OpenAI's.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pi_ray.config import TrainConfig
from pi_ray.hosted.client import ENDED_BADLY, Service, UnknownError
from pi_ray.run.artifact import digest

STATES = {  # Together's word for a job's state -> OpenAI's; others are running
    "pending": "queued", "queued": "queued", "completed": "succeeded", "error": "failed", "cancelled": "cancelled",
}


class TogetherService(Service):
    """Jobs as `Service` has them, with OpenAI's names for their fields and states."""

    def upload(self, path: Path) -> str:
        fields = {"purpose": "fine-tune", "file_name": path.name, "file_type": "jsonl"}

        def request() -> dict[str, Any]:
            files, headers = {"file": (path.name, path.read_bytes())}, {"Content-Type": "multipart/form-data"}
            return self._post("/files/upload", body=fields, files=files, options={"headers": headers})

        return self._tried(f"uploading {path.name}", request)["id"]

    def file_status(self, file: str) -> str:
        try:
            found = self._tried(f"looking at file {file}", partial(self._get, f"/files/{file}"))
        except UnknownError:
            return ""
        return "processed" if found.get("Processed") else "processing"

    def create_job(self, file: str, model: str, suffix: str, epochs: int, train: TrainConfig) -> Any:
        lora, closed = train.lora, self.settings
        start = {"model": model} if model == closed.model else {"from_checkpoint": model}
        chosen = {"batch_size": closed.batch_size, "learning_rate": closed.lr}
        body = {
            **start, "training_file": file, "suffix": suffix, "n_epochs": epochs, "random_seed": train.seed,
            "training_method": {"method": "sft", "train_on_inputs": False},
            "training_type": {"type": "Lora", "lora_r": lora.rank, "lora_alpha": lora.alpha},
            **{name: value for name, value in chosen.items() if value},
        }
        create = partial(self._post, "/fine-tunes", body=body)
        return self._tried(f"fine-tuning {model}", lambda: self._job_on(file) or _as_job(create()))

    def job(self, job: str) -> Any:
        return _as_job(self._tried(f"looking at job {job}", partial(self._get, f"/fine-tunes/{job}")))

    def events(self, job: str, seen: set[str]) -> list[Any]:
        """News of the job that are not among `seen`, oldest first, and its losses."""
        try:
            news = self._tried(f"reading the events of job {job}", partial(self._get, f"/fine-tunes/{job}/events"))
            metrics = self._tried(f"reading the losses of job {job}", partial(self._get, f"/fine-tunes/{job}/metrics"))
        except UnknownError:
            return []
        found = [*_messages(news.get("data") or []), *_losses(metrics.get("metrics") or [])]
        return [event for event in found if event.id not in seen]

    def _job_on(self, file: str) -> Any | None:
        jobs = map(_as_job, self._get("/fine-tunes").get("data") or [])
        return next((job for job in jobs if job.training_file == file and job.status not in ENDED_BADLY), None)

    def _get(self, path: str) -> dict[str, Any]:
        return self.client.get(path, cast_to=dict[str, Any])

    def _post(self, path: str, **request: Any) -> dict[str, Any]:
        return self.client.post(path, cast_to=dict[str, Any], **request)


def _as_job(found: dict[str, Any]) -> SimpleNamespace:
    status = STATES.get(found["status"], "running")
    problems = [event["message"] for event in found.get("events") or [] if event.get("level") == "error"]
    return SimpleNamespace(
        id=found["id"], status=status, training_file=found.get("training_file"),
        fine_tuned_model=found.get("model_output_name"), trained_tokens=found.get("token_count"),
        created_at=_seconds(found.get("created_at")),
        finished_at=_seconds(found.get("updated_at")) if status == "succeeded" else None,
        error=SimpleNamespace(message=problems[-1]) if problems else None,
    )


def _messages(events: list[dict[str, Any]]) -> Iterator[SimpleNamespace]:
    for event in events:
        name = event.get("hash") or digest([event.get("created_at"), event.get("type"), event["message"]])
        yield SimpleNamespace(id=name, message=event["message"], data={})


def _losses(metrics: list[dict[str, Any]]) -> Iterator[SimpleNamespace]:
    for values in metrics:
        match values:
            case {"train/global_step": step, "train/loss": loss}:
                data = {"step": int(step), "train_loss": float(loss)}
                yield SimpleNamespace(id=f"step {int(step)}", message=f"step {int(step)}: loss {loss:.4g}", data=data)


def _seconds(moment: str | None) -> float:
    """Seconds since 1970 of an ISO 8601 time; 0 where there is none."""
    return datetime.fromisoformat(moment).timestamp() if moment else 0
