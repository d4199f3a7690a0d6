"""Closed models: what a service is sent, that nothing is paid for twice whatever breaks, and what it says when it
cannot go on.
"""

import json
import re
import shutil
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pi_ray import hosted, models
from pi_ray.config import PromptConfig, RunConfig
from pi_ray.errors import ConfigError, CorruptArtifactError, MissingExtraError, StorageError, TrainingError
from pi_ray.evaluate.columns import Column, columns_of, trained_column
from pi_ray.evaluate.evaluate import evaluate_run
from pi_ray.evaluate.hosted_answerer import HostedAnswerer
from pi_ray.hosted import client, price, tuning
from pi_ray.hosted.client import Service
from pi_ray.progress import format_money
from pi_ray.prompt import Example, PromptEncoder, render_prompt
from pi_ray.report.page import write_report
from pi_ray.run.artifact import read_manifest, staged
from pi_ray.run.directory import RunDir
from pi_ray.run.lock import run_lock
from pi_ray.run.phases import plain_finetuning_config, prompts_of_columns
from tests.unit.fake_openai import FakeOpenAI

KEY = "sk-secret-0123456789"
TEMPLATES = {1.0: "Translate a colour into its code. red is k4, blue is z9.", 0.5: "colour code. red k4, blue z9."}
CODES = {"red": "k4", "blue": "z9", "green": "q1"}
ROWS = {
    "train": [(f"train-{i}", f"what is {n}, {i}?", CODES[n], "") for i, n in enumerate(["red", "blue", "green"] * 4)],
    "dev": [("dev-0", "is it red?", "k4", "")],
    "test": [
        (f"test-{i}", f"tell me {n}, {i}", CODES[n], "old" if i % 2 else "new")
        for i, n in enumerate(["red", "blue", "green"] * 2)
    ],
}


def write_prepared(config: RunConfig) -> None:
    """What preparation leaves and closed models read, by hand."""
    run, encoder = RunDir(config.root), PromptEncoder(models.load_tokenizer(config.model), config.prompt)
    with staged(run.rows, fingerprint="by-hand", rows={split: len(rows) for split, rows in ROWS.items()}) as folder:
        for split, rows in ROWS.items():
            pq.write_table(
                pa.table(dict(zip(("id", "query", "answer", "group"), zip(*rows, strict=True), strict=True))),
                folder / f"{split}.parquet",
            )
    with staged(run.templates, fingerprint="by-hand") as folder:
        entries = [
            {
                "rate": r, "text": text, "asked": r, "achieved": r, "tokens": 9, "full_tokens": 9, "compressor": "none",
                "note": "",
            }
            for r, text in TEMPLATES.items()
        ]
        (folder / "templates.json").write_text(json.dumps(entries))
    near = [
        (i, split, [] if i in ("train-0", "train-1") else ["train-0", "train-1"], [9.0, 8.0])
        for split, rows in ROWS.items()
        for i, *_ in rows
    ]
    pq.write_table(
        pa.table(dict(zip(("id", "split", "neighbours", "scores"), zip(*near, strict=True), strict=True))),
        run.neighbours,
    )
    for i, (rate, shots) in enumerate([(1.0, 2), (0.5, 1), (0.0, 0)]):
        tokens = {
            "prefix": len(encoder.prefix(TEMPLATES.get(rate, ""))), "row_mean": 10 + 10 * shots, "row_max": 40,
            "label_mean": 4, "label_max": 6,
        }
        with staged(
            run.phase(i), fingerprint="by-hand", phase={"rate": rate, "shots": shots}, rows=len(ROWS["train"]),
            tokens=tokens,
        ):
            pass


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(RunConfig(name="x").model)


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeOpenAI(KEY, answered) as running:
        yield running


def answered(model, prompt):
    """Tuned models know the codes, the base model says one and the same."""
    return next(code for name, code in CODES.items() if name in prompt) if model.startswith("ft:") else "k4"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer):
    """A prepared run of three phases."""
    made = RunConfig(
        name="colours", run_dir=str(tmp_path_factory.mktemp("prepared")), prompt={"chat": "chatml"},
        task={"name": "opsql"},
    ).replace(
        **{
            "schedule": {"phases": 3, "shots": 2, "epochs": [1, 2, 3]}, "train.seed": 7, "train.backend.name": "openai",
            "closed.model": "base-1", "closed.poll_s": 0, "closed.confirmed": True, "evaluate.bootstrap": 20,
        }
    )
    write_prepared(made)
    return made


@pytest.fixture
def config(tmp_path, prepared, service, tokenizer, monkeypatch):
    for module in (models, price):
        monkeypatch.setattr(module, "load_tokenizer", lambda settings: tokenizer)
    shutil.copytree(prepared.root, tmp_path / "run")
    return prepared.replace(run_dir=str(tmp_path / "run"), **{"closed.base_url": service.url})


class Listener(list):
    """A `watch`, and waits that take no time."""

    __call__ = list.append

    def messages(self):
        return " | ".join(e["message"] for e in self)


def tune(config, watch=None, **options):
    return hosted.tune(config, watch if watch is not None else Listener(), wait=lambda seconds: None, **options)


# What is sent


def test_a_service_is_sent_the_words_that_a_local_model_gets_as_ids(tokenizer):
    for prompt in (
        PromptConfig(chat="chatml"),
        PromptConfig(chat="chatml", query="Q: {query}\nA:", example="{query} -> {answer}", examples_heading=""),
    ):
        encoder = PromptEncoder(tokenizer, prompt)
        for template, shots in (("", ()), ("T E M P L A T E", [Example("far", "1"), Example("near", "2")])):
            framed = tokenizer.decode(encoder.encode("some query", template, shots))
            assert framed == encoder.head + render_prompt(prompt, "some query", template, shots) + encoder.tail


def test_each_phase_has_a_file_of_messages_with_less_of_the_prompt_and_at_last_the_query_alone(config):
    folder = tuning.write_training_files(RunDir(config.root), config)
    files = [
        [json.loads(line)["messages"] for line in (folder / f"phase-{i}.jsonl").read_text().splitlines()]
        for i in range(3)
    ]
    query = "what is green, 2?"
    assert [f[2][0]["content"] for f in files] == [
        f"{TEMPLATES[1.0]}\n\nExamples:\n\nwhat is blue, 1?\nz9\n\nwhat is red, 0?\nk4\n\n{query}",
        f"{TEMPLATES[0.5]}\n\nExamples:\n\nwhat is red, 0?\nk4\n\n{query}",
        query,
    ]
    assert {len(f) for f in files} == {len(ROWS["train"])}
    assert all(
        [m["role"] for m in row] == ["user", "assistant"] and row[1]["content"] in CODES.values()
        for f in files
        for row in f
    )


def test_files_are_hashed_made_once_and_a_damaged_one_is_not_sent(config, service):
    folder = tuning.write_training_files(RunDir(config.root), config)
    assert set(read_manifest(folder)["files"]) == {"phase-0.jsonl", "phase-1.jsonl", "phase-2.jsonl"}
    (folder / "phase-1.jsonl").write_text("{}\n")
    assert tuning.write_training_files(RunDir(config.root), config) == folder
    with pytest.raises(CorruptArtifactError, match=r"phase-1\.jsonl: sha256"):
        tune(config)
    assert service.requests == []


def test_what_a_service_cannot_be_asked_for_is_said_before_it_is_asked(config, service, tmp_path):
    with pytest.raises(TrainingError, match="nothing prepared"):
        tune(config.replace(run_dir=str(tmp_path / "other")))
    if "steps" in type(config.schedule).model_fields:
        with pytest.raises(ConfigError, match=r"schedule\.epochs"):
            tune(config.replace(**{"schedule.steps": 5}))
    if "objective" in type(config.train).model_fields:
        with pytest.raises(ConfigError, match="labels alone"):
            tune(config.replace(**{"train.objective": "distill", "train.backend.zero_stage": 2}))
    assert service.requests == []


# Tuning


def test_each_phase_is_a_job_that_continues_from_the_model_of_the_phase_before(config, service):
    watch = Listener()
    model = tune(config, watch)
    jobs = list(service.jobs.values())
    assert [j["model"] for j in jobs] == ["base-1", jobs[0]["fine_tuned_model"], jobs[1]["fine_tuned_model"]]
    assert model == jobs[2]["fine_tuned_model"]
    assert [j["hyperparameters"] for j in jobs] == [{"n_epochs": 1}, {"n_epochs": 2}, {"n_epochs": 3}]
    assert {j["seed"] for j in jobs} == {7}
    assert all(
        len(j["user_provided_suffix"]) == 18 and f"-p{i}-" in j["user_provided_suffix"] for i, j in enumerate(jobs)
    )
    assert [len(service.uploaded(j["training_file"])[2]["messages"][0]["content"]) for j in jobs] == [127, 79, 17]
    assert {f["purpose"] for f in service.files.values()} == {"fine-tune"}
    assert [(e["phase"], e["status"]) for e in watch if e.get("status") == "running"] == [
        (0, "running"), (1, "running"), (2, "running"),
    ]
    assert "Step 3/3" in watch.messages() and "1,000 tokens trained" in watch.messages()
    assert hosted.tuned_phases(config)[-1].get("model")


def test_batch_size_and_learning_rate_are_sent_only_when_they_are_set(config, service):
    tune(config.replace(**{"closed.batch_size": 4, "closed.lr_multiplier": 0.5}))
    assert next(iter(service.jobs.values()))["hyperparameters"] == {
        "n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 0.5,
    }


def test_losses_of_all_phases_are_in_the_training_log_with_steps_that_count_on(config, service):
    tune(config)
    log = [json.loads(line) for line in RunDir(config.root).train_log.read_text().splitlines()]
    assert [(e["step"], e["phase"]) for e in log] == [(i, i // 3) for i in range(9)]
    assert [e["loss"] for e in log[:3]] == [1, 1 / 2, 1 / 3]


def test_a_tuned_run_asks_the_service_for_nothing_and_needs_no_key(config, service, monkeypatch):
    model = tune(config)
    service.requests.clear()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert tune(config.replace(**{"closed.confirmed": False})) == model
    assert service.requests == []


def test_a_change_of_the_last_phase_keeps_the_jobs_before_it_and_going_back_costs_nothing(config, service):
    first = tune(config)
    assert tune(config.replace(**{"schedule.epochs": [1, 2, 5]})) != first
    assert len(service.jobs) == 4
    assert tune(config) == first
    assert len(service.jobs) == 4
    tune(config.replace(**{"train.seed": 8}))
    assert len(service.jobs) == 7


# Whatever breaks, no job is created twice


def killed_when(monkeypatch, seen):
    """Make the write of the state that has `seen` in it the moment of the kill."""
    write = tuning.write_atomic

    def dying(path, content):
        if seen in content:
            monkeypatch.setattr(tuning, "write_atomic", write)
            raise KeyboardInterrupt
        return write(path, content)

    monkeypatch.setattr(tuning, "write_atomic", dying)


@pytest.mark.fault
@pytest.mark.parametrize(
    "moment, jobs_then",
    [
        ('"file": "file-0"', 0), ('"job": "ftjob-0"', 1), ('"status": "running"', 1), ('"model": "ft:ftjob-0', 1),
        ('"job": "ftjob-1"', 2),
    ],
)
def test_a_run_killed_at_any_moment_goes_on_without_paying_twice(config, service, monkeypatch, moment, jobs_then):
    killed_when(monkeypatch, moment)
    with pytest.raises(KeyboardInterrupt):
        tune(config)
    assert len(service.jobs) == jobs_then
    assert not hosted.tuned_phases(config)[-1].get("model")
    assert tune(config) == list(service.jobs.values())[2]["fine_tuned_model"]
    assert len(service.jobs) == 3
    assert [e["step"] for e in map(json.loads, RunDir(config.root).train_log.read_text().splitlines())] == list(
        range(9)
    )


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["lose", "drop", 500, 503, 429])
def test_a_lost_connection_or_a_busy_service_is_tried_again_and_makes_no_second_job(config, service, fault):
    service.faults = {
        request: [fault, fault]
        for request in ("POST /fine_tuning/jobs", "POST /files", "GET /fine_tuning/jobs", "GET /files")
    }
    tune(config)
    assert len(service.jobs) == 3
    assert not any(service.faults.values())


def tune_after_a_loss(config, service, monkeypatch):
    """Tune a run that was killed behind its first job, whose service then lost files and jobs."""
    killed_when(monkeypatch, '"job": "ftjob-0"')
    with pytest.raises(KeyboardInterrupt):
        tune(config)
    service.jobs.clear()
    service.files.clear()
    tune(config)


@pytest.mark.fault
def test_a_file_that_the_service_has_lost_is_uploaded_again(config, service, monkeypatch):
    tune_after_a_loss(config, service, monkeypatch)
    assert len(service.jobs) == len(service.files) == 3


@pytest.mark.fault
@pytest.mark.parametrize("outcome, reason", [("failed", "The loss exploded"), ("cancelled", "no reason")])
def test_a_job_that_ends_badly_stops_the_run_with_the_services_words_and_is_created_anew_by_the_next(
    config, service, outcome, reason
):
    service.outcomes = ["succeeded", outcome]
    with pytest.raises(
        TrainingError, match=rf"phase 1: job ftjob-1 {outcome}: .*{reason}\. The same command tries the phase again"
    ):
        tune(config)
    tune(config)
    assert [j["status"] for j in service.jobs.values()] == ["succeeded", outcome, "succeeded", "succeeded"]
    assert len(service.files) == 3


@pytest.mark.fault
def test_a_service_that_stays_away_is_given_up_after_bounded_tries_and_the_next_run_goes_on(config, service):
    waits = []
    service.faults["POST /files"] = [500] * 50
    with pytest.raises(
        TrainingError,
        match=rf"uploading phase-0\.jsonl: The server had an error \(tried {client.RETRIES + 1} times\).*same command",
    ):
        hosted.tune(config, wait=waits.append)
    assert service.count("POST /files") == client.RETRIES + 1
    assert all(0.75 * 2**i <= w <= 1.25 * min(2**i, 60) for i, w in zip(range(6), waits, strict=False))
    assert max(waits) <= 75
    service.faults.clear()
    assert tune(config)


@pytest.mark.fault
def test_a_dead_service_is_named_by_the_lost_connection(config, service):
    service.faults["GET /fine_tuning/jobs/"] = ["drop"] * 50
    with pytest.raises(TrainingError, match=r"looking at job ftjob-0: .*disconnected.*same command"):
        tune(config)
    service.faults.clear()
    tune(config)
    assert len(service.jobs) == 3


def test_retry_after_is_what_is_waited(config, service):
    waits = []
    service.faults["POST /chat"] = [429, 429]
    Service(config.closed, waits.append).chat("base-1", "hello", 5)
    assert waits == [0.0, 0.0]


@pytest.mark.parametrize("fault", [400, 402])
def test_what_does_not_pass_is_not_tried_again(config, service, fault):
    service.faults["POST /fine_tuning/jobs"] = [fault]
    with pytest.raises(TrainingError, match=r"fine-tuning base-1: (The server had an error|insufficient_quota)"):
        tune(config)
    assert service.count("POST /fine_tuning/jobs") == 1


def test_a_job_that_the_service_has_forgotten_is_said_with_the_way_out(config, service, monkeypatch):
    killed_when(monkeypatch, '"status": "running"')
    with pytest.raises(KeyboardInterrupt):
        tune(config)
    service.jobs.clear()
    with pytest.raises(TrainingError, match=r"phase 0: looking at job ftjob-0: No such object.*delete .*state\.json"):
        tune(config)


def test_two_processes_do_not_tune_the_same_run(config, service):
    with run_lock(config.root / "closed", "is here"), pytest.raises(StorageError, match="another process is here"):
        tune(config)
    assert service.requests == []


def test_an_unreadable_state_is_not_taken_for_an_empty_one(config, service):
    tune(config)
    (config.root / "closed" / "state.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match="pays for every phase again"):
        tune(config)
    assert len(service.jobs) == 3


# Money and the key


def test_the_cost_is_told_and_declining_it_uploads_nothing(config, service):
    asked = []
    with pytest.raises(TrainingError, match="not confirmed, so nothing was uploaded"):
        tune(config.replace(**{"closed.confirmed": False}), confirm=lambda sentence: asked.append(sentence) or False)
    assert service.requests == [] and not (config.root / "closed" / "state.json").exists()
    tokens = {i: price.phase_tokens(config, i, epochs) for i, epochs in enumerate((1, 2, 3))}
    rows = len(ROWS["train"])
    assert tokens[2] == rows * (read_manifest(RunDir(config.root).phase(2))["tokens"]["prefix"] + 14) * 3
    assert (
        f"{sum(tokens.values()):,} tokens (phase 0: {tokens[0]:,}, phase 1: {tokens[1]:,}, phase 2: {tokens[2]:,})"
        in asked[0]
    )
    assert "USD" in asked[0] and "6 rows" in asked[0]


def test_the_estimate_is_tokens_times_the_configs_prices(config, tokenizer):
    def estimate(phases, prompts):
        """(Tokens of training, of input, of output), and the sentence that names them."""
        said = price.describe_cost(settings, phases, prompts)
        counts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:tokens \(|input|output)", said)]
        return counts, said

    settings = config.replace(**{"closed.train_price": 10.0, "closed.input_price": 2.0, "closed.output_price": 4.0})
    (trained, read, written), said = estimate([0, 2], [("", 0, 0.0), (TEMPLATES[1.0], 2, 1.0), ("", 0, 0.0)])
    assert trained == price.phase_tokens(settings, 0, 1) + price.phase_tokens(settings, 2, 3)
    assert "phase 0: " in said and "phase 2: " in said and "phase 1: " not in said
    costs = trained * 10 / 1e6, (read * 2 + written * 4) / 1e6
    assert all(format_money(cost, "USD") in said for cost in (*costs, sum(costs)))
    [query_alone, answers], said = estimate([], [("", 0, 0.0)])
    assert "Fine-tuning" not in said and query_alone < read / 3
    assert answers == sum(len(tokenizer(a).input_ids) + 1 for _, _, a, _ in ROWS["test"])


def test_only_what_is_still_to_be_trained_is_asked_for(config, service):
    service.outcomes = ["succeeded", "failed"]
    with pytest.raises(TrainingError):
        tune(config)
    asked = []
    tune(config.replace(**{"closed.confirmed": False}), confirm=lambda sentence: asked.append(sentence) or True)
    assert len(asked) == 1 and "phase 1" in asked[0] and "phase 2" in asked[0] and "phase 0" not in asked[0]


def test_a_job_that_is_running_already_is_followed_without_asking(config, service, monkeypatch):
    config = config.replace(
        **{"schedule": {"name": "constant", "shots": 0, "rate_start": 0.5, "rate_end": 0.5, "phases": 1}}
    )
    killed_when(monkeypatch, '"status": "running"')
    with pytest.raises(KeyboardInterrupt):
        tune(config)
    assert tune(config.replace(**{"closed.confirmed": False}))


def test_on_a_terminal_the_question_is_asked_and_elsewhere_the_key_that_confirms_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(ConfigError, match=r"closed\.confirmed=true"):
        hosted.ask_on_terminal("It costs 3.")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for said, meant in (("y", True), ("YES ", True), ("", False), ("n", False)):
        monkeypatch.setattr("builtins.input", lambda question, said=said: said)
        assert hosted.ask_on_terminal("It costs 3.") is meant
    assert "It costs 3." in capsys.readouterr().out


def test_the_key_is_in_no_file_and_no_message_even_when_the_service_repeats_it(config, service, monkeypatch):
    watch = Listener()
    tune(config, watch)
    evaluate(config)
    assert [p for p in config.root.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()] == []
    assert KEY not in watch.messages()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-9876543210")
    with pytest.raises(ConfigError, match=r"refuses the key in OPENAI_API_KEY: Incorrect API key provided: \*\*\*$"):
        tune(config.replace(**{"train.seed": 8}))


def test_no_key_and_no_package_are_said_before_anything_is_sent(config, service, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is empty"):
        tune(config)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"pi-ray\[closed\]"):
        tune(config)
    assert service.requests == []


@pytest.mark.parametrize("url", ["https://user:pass@host/v1", "ftp://host", "https://host/v1?key=sk-1"])
def test_an_address_with_a_secret_in_it_is_refused(url):
    with pytest.raises(ValidationError, match="key belongs in the environment"):
        RunConfig(name="x", closed={"base_url": url})


def test_the_address_is_the_configs_and_not_the_environments(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert str(Service(RunConfig(name="x").closed).client.base_url) == client.OPENAI + "/"


# Answers


def answers(config, model, prompts, limit):
    return [r.text for r in client.replies(config, model, prompts, limit)]


def test_answers_come_in_the_order_of_the_prompts_several_at_a_time_and_greedy(config, service):
    meet = threading.Barrier(client.PARALLEL, timeout=60)

    service.answer, reply = lambda model, prompt: prompt[::-1], service.reply
    service.reply = lambda *args: (meet.wait(), reply(*args))
    prompts = [f"prompt {i}" for i in range(2 * client.PARALLEL)]
    assert answers(config, "base-1", prompts, 9) == [p[::-1] for p in prompts]
    assert service.most_at_once == client.PARALLEL
    assert {(c["temperature"], c["max_tokens"], c["model"]) for c in service.chats} == {(0, 9, "base-1")}


def test_a_model_that_reasons_is_asked_with_the_keys_that_it_takes(config, service):
    chat = service.chat

    def refuse(wanted):
        for key, word in (("max_tokens", "parameter"), ("temperature", "value")):
            if key in wanted:
                message = f"Unsupported {word}: '{key}' is not supported with this model."
                return 400, {"error": {"message": message, "type": "invalid_request_error"}}
        return chat(wanted)

    service.chat = refuse
    assert answers(config, "base-1", ["a", "b"], 9) == ["k4", "k4"]
    assert {(c["max_completion_tokens"], c.get("temperature")) for c in service.chats} == {(9, None)}
    service.chat = lambda wanted: (400, {"error": {"message": "max_tokens is too large: 9"}})
    with pytest.raises(TrainingError, match="too large"):
        answers(config, "base-1", ["c"], 9)


@pytest.mark.fault
def test_answers_that_are_there_are_not_asked_for_again_even_after_a_kill_in_mid_line(config, service):
    service.answer = lambda model, prompt: prompt.upper()
    service.faults["POST /chat"] = [None] * 5 + [400]
    prompts = [f"prompt {i}" for i in range(6)]
    with pytest.raises(TrainingError, match="asking base-1"):
        answers(config, "base-1", prompts, 9)
    log = config.root / "closed" / "answers.jsonl"
    whole = log.read_text().splitlines()
    log.write_text("\n".join([*whole[:-1], whole[-1][:20]]))
    service.requests.clear()
    assert answers(config, "base-1", prompts, 9) == [p.upper() for p in prompts]
    assert service.count("POST /chat/completions") == 6 - (len(whole) - 1)
    service.requests.clear()
    assert answers(config, "base-1", [*prompts, prompts[0]], 9)[-1] == "PROMPT 0"
    assert service.requests == []
    sent: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "NOTIFY_EVERY", 1)
        patch.setattr(client, "notify_written", sent.append)
        answers(config, "base-1", prompts[:1], 10)
    assert sent == [log, log], "paid replies go to object storage before the run ends"
    answers(config, "base-2", prompts[:1], 9)
    assert service.count("POST /chat/completions") == 2


@pytest.mark.fault
def test_answers_that_come_after_one_has_failed_are_kept_since_they_are_paid_for(config, service):
    everyone, failed = threading.Barrier(client.PARALLEL, timeout=60), threading.Event()
    reply = service.reply

    def slowly(*args):
        everyone.wait()
        assert args[-1] or failed.wait(60), "all but one wait until that one has failed"
        return reply(*args)

    service.reply = slowly
    service.faults["POST /chat"] = [400]
    ask = client.Service.chat

    def chat(self, *request):
        try:
            return ask(self, *request)
        except TrainingError:
            threading.Timer(0.2, failed.set).start()
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.Service, "chat", chat)
        with pytest.raises(TrainingError, match="asking base-1"):
            answers(config, "base-1", [f"prompt {i}" for i in range(client.PARALLEL)], 9)
    log = (config.root / "closed" / "answers.jsonl").read_text().splitlines()
    assert len([line for line in log if line]) == client.PARALLEL - 1


@pytest.mark.fault
@pytest.mark.parametrize("fault", [429, 500, "drop", "lose"])
def test_answers_survive_a_busy_service_and_lost_connections(config, service, fault):
    service.faults["POST /chat"] = [fault] * 5
    assert [r.text for r in client.replies(config, "base-1", ["a", "b", "c"], 9, wait=lambda seconds: None)] == [
        "k4"
    ] * 3


# Evaluation


def evaluate(config, *arguments, confirm=lambda sentence: False, **options):
    answerer = HostedAnswerer(config, confirm, wait=lambda seconds: None)
    return evaluate_run(config, *arguments, **options, answerer=answerer)


def test_the_tuned_model_is_asked_with_the_query_alone_and_the_base_model_without_and_with_the_prompt(config, service):
    model = tune(config)
    watched = []
    summary = evaluate(config, lambda *seen: watched.append(seen))
    by_model = {m: [c["messages"][0]["content"] for c in service.chats if c["model"] == m] for m in ("base-1", model)}
    queries = {q for _, q, _, _ in ROWS["test"]}
    assert set(by_model[model]) == queries
    assert queries < set(by_model["base-1"]) and len(by_model["base-1"]) == 12
    assert sum(p.startswith(f"{TEMPLATES[1.0]}\n\nExamples:\n\nwhat is blue, 1?") for p in by_model["base-1"]) == 6
    assert (summary["promptintern"]["exact_match"], summary["base"]["exact_match"]) == (1.0, pytest.approx(1 / 3))
    assert "plain" not in summary
    assert ("promptintern", 6, 6) in watched
    words = sum(len(q.split()) for q in queries) / 6
    assert summary["promptintern"]["input_tokens"] == pytest.approx(words)
    assert summary["promptintern"]["output_tokens"] == 1
    assert 0 < summary["promptintern"]["latency_s"] < 5
    assert summary["base_full_prompt"]["prefix_tokens"] > summary["base"]["prefix_tokens"]
    assert summary["train"]["promptintern"] == {
        "updates": 9, "seconds": 180, "tokens": 3000, "workers": 1, "money": 0.009,
    }
    assert set(summary["promptintern"]["groups"]) == {"old", "new"}


def test_the_plain_baseline_is_a_column_once_it_has_a_model_of_its_own(config, service):
    plain = plain_finetuning_config(config)
    write_prepared(plain)
    tune(config)
    model = tune(plain, columns=("plain",))
    assert len(service.jobs) == 6 and plain.root != config.root
    columns = columns_of(config)
    assert [(c.name, c.adapter) for c in columns if c.name == "plain"] == [("plain", model)]
    summary = evaluate(config, columns=[trained_column(config), *columns[2:3]])
    assert set(summary["train"]) == {"promptintern", "plain"} and "base" not in summary
    assert "plain" not in [c.name for c in columns_of(config.replace(**{"evaluate.baseline": False}))]


def test_an_evaluation_is_skipped_when_nothing_changed_and_then_asks_nothing(config, service, monkeypatch):
    tune(config)
    first = evaluate(config)
    service.requests.clear()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert evaluate(config) == first
    evaluate(config.replace(**{"evaluate.bootstrap": 30}))
    assert service.requests == []


def test_an_evaluation_of_other_rows_is_asked_only_after_its_cost_was_confirmed(config, service):
    config, asked = config.replace(**{"closed.confirmed": False}), []
    tune(config, confirm=lambda sentence: asked.append(sentence) or True)
    evaluate(config)
    assert len(asked) == 1, "the evaluation was confirmed with the training"
    longer = config.replace(**{"evaluate.max_new_tokens": 50})
    service.chats.clear()
    with pytest.raises(TrainingError, match="not confirmed"):
        evaluate(longer)
    assert not service.chats
    evaluate(longer, confirm=lambda sentence: asked.append(sentence) or True)
    assert len(asked) == 2 and asked[1].startswith("Evaluation on 6 rows") and service.chats


def test_the_base_model_alone_is_asked_only_after_its_cost_was_confirmed(config, service):
    columns, asked = [Column(name, "", *prompts_of_columns(config)[name]) for name in ("base", "base_full_prompt")], []
    config = config.replace(**{"closed.confirmed": False})
    with pytest.raises(TrainingError, match="not confirmed"):
        evaluate(config, columns=columns)
    assert service.requests == []
    assert set(evaluate(config, columns=columns, confirm=lambda sentence: asked.append(sentence) or True)) >= {
        "base", "base_full_prompt",
    }
    assert len(asked) == 1 and asked[0].startswith("Evaluation on 6 rows")


def test_a_run_without_a_model_says_so(config):
    with pytest.raises(TrainingError, match="pi-ray train"):
        evaluate(config)


def test_a_service_that_counts_no_tokens_gets_them_counted_here(config, service, tokenizer):
    tune(config)
    chat = service.chat
    service.chat = lambda wanted: (200, {**chat(wanted)[1], "usage": None})
    summary = evaluate(config)
    encoder = PromptEncoder(tokenizer, config.prompt)
    assert summary["promptintern"]["input_tokens"] == pytest.approx(
        sum(len(encoder.encode(q)) for _, q, _, _ in ROWS["test"]) / 6
    )
    assert summary["promptintern"]["output_tokens"] == pytest.approx(
        sum(len(encoder.answer(a)) for _, _, a, _ in ROWS["test"]) / 6
    )


def test_report_and_samples_are_those_of_any_run(config):
    tune(config)
    evaluate(config)
    run = RunDir(config.root)
    page = write_report(run, config).read_text()
    assert "PromptIntern" in page and "base-1" in page and KEY not in page
    sample = json.loads((run.evaluation / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample["outputs"]) == {"base", "base_full_prompt", "promptintern"}
    assert read_manifest(run.evaluation)["files"].keys() == {"summary.json", "samples.jsonl", "outputs.jsonl"}
