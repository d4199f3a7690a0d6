# ruff: noqa: F811 (fixtures)
"""The same phases by services beside OpenAI's own: what Together AI and Azure are sent is what their documents have."""

import json

import pytest

from pi_ray import hosted
from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError, TrainingError
from pi_ray.run.directory import RunDir
from tests.unit.fake_services import FakeAzure, FakeTogether
from tests.unit.hosted.test_hosted import (  # noqa: F401 (fixtures)
    KEY,
    Listener,
    answered,
    config,
    killed_when,
    prepared,
    tokenizer,
    tune,
    tune_after_a_loss,
)


@pytest.fixture(params=[FakeTogether, FakeAzure], ids=["together", "azure"])
def service(request, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with request.param(KEY, answered) as running:
        yield running


def settings(config, service):
    return config.replace(**{"closed.jobs": "together"}) if isinstance(service, FakeTogether) else config


def test_each_phase_is_a_job_from_the_model_of_the_phase_before(config, service):
    watch = Listener()
    model = tune(settings(config, service), watch)
    jobs = list(service.jobs.values())
    assert [j["model"] for j in jobs] == ["base-1", jobs[0]["fine_tuned_model"], jobs[1]["fine_tuned_model"]]
    assert model == jobs[2]["fine_tuned_model"] and {j["seed"] for j in jobs} == {7}
    assert [len(service.uploaded(j["training_file"])[2]["messages"][0]["content"]) for j in jobs] == [127, 79, 17]
    assert {f["purpose"] for f in service.files.values()} == {"fine-tune"}
    done = hosted.tuned_phases(settings(config, service))
    assert [phase["model"] for phase in done] == [j["fine_tuned_model"] for j in jobs]
    if isinstance(service, FakeAzure):
        assert [j["hyperparameters"]["n_epochs"] for j in jobs] == [1, 2, 3]
        assert {phase["seconds"] for phase in done} == {0} and all(phase["tokens"] > 0 for phase in done)
        return
    assert [(body["n_epochs"], "model" in body) for body in service.bodies] == [(1, True), (2, False), (3, False)]
    assert all(body["training_type"] == {"type": "Lora", "lora_r": 32, "lora_alpha": 64} for body in service.bodies)
    assert not any({"batch_size", "learning_rate"} & set(body) for body in service.bodies)
    assert [(phase["tokens"], phase["seconds"], phase["updates"]) for phase in done] == [(1000, 60, 3)] * 3
    log = [json.loads(line) for line in RunDir(config.root).train_log.read_text().splitlines()]
    assert [(e["step"], e["loss"]) for e in log[:4]] == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 1.0)]
    assert "step 2: loss 0.5" in watch.messages()


@pytest.mark.fault
@pytest.mark.parametrize("moment, jobs_then", [('"file": "file-0"', 0), ('"job": "ftjob-0"', 1), ('"model": "ft:', 1)])
def test_a_killed_run_goes_on_without_paying_twice(config, service, monkeypatch, moment, jobs_then):
    own = settings(config, service)
    killed_when(monkeypatch, moment)
    with pytest.raises(KeyboardInterrupt):
        tune(own)
    assert len(service.jobs) == jobs_then
    tune(own)
    assert len(service.jobs) == 3


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["lose", 503, 429])
def test_a_lost_connection_makes_no_second_job(config, service, fault):
    requests = ("POST /fine", "POST /files", "GET /fine", "GET /files")
    service.faults = {request: [fault, fault] for request in requests}
    tune(settings(config, service))
    assert len(service.jobs) == 3 and not any(service.faults.values())


@pytest.mark.fault
def test_a_job_that_fails_is_said_in_the_services_words_and_created_anew(config, service):
    own = settings(config, service)
    service.outcomes = ["failed"]
    with pytest.raises(TrainingError, match=r"phase 0: job ftjob-0 failed: The loss exploded\."):
        tune(own)
    tune(own)
    assert len(service.jobs) == 4 and len(service.files) == 3


@pytest.mark.fault
def test_a_file_and_a_job_that_the_service_has_lost_are_made_again(config, service, monkeypatch):
    tune_after_a_loss(settings(config, service), service, monkeypatch)
    assert len(service.jobs) == len(service.files) == 3


@pytest.mark.parametrize("block, reason", [
    ("jobs: together", "closed.jobs together: give its address, closed.base_url: https://api.together.xyz/v1"),
    ("{jobs: together, base_url: 'https://api.together.xyz/v1', lr_multiplier: 2}", "take closed.lr"),
    ("lr: 0.001", "closed.lr is not for closed.jobs openai; take closed.lr_multiplier"),
])
def test_settings_that_the_service_does_not_have_are_refused(block, reason):
    block = block if block.startswith("{") else f"{{{block}}}"
    with pytest.raises(ConfigError, match=reason):
        parse_run_file(f"name: a\nclosed: {block}", "run.yaml")


def test_batch_size_and_learning_rate_are_sent_when_they_are_set(config, service):
    own = settings(config, service)
    if isinstance(service, FakeTogether):
        tune(own.replace(**{"closed.batch_size": 8, "closed.lr": 1e-4}))
        assert {(body["batch_size"], body["learning_rate"]) for body in service.bodies} == {(8, 1e-4)}
    else:
        tune(own.replace(**{"closed.batch_size": 8, "closed.lr_multiplier": 0.5}))
        assert {j["hyperparameters"]["learning_rate_multiplier"] for j in service.jobs.values()} == {0.5}
