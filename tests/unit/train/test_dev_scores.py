"""Dev scores of phases: what they are under, that they change no weights, and that workers and restarts agree."""

import json
from types import SimpleNamespace

import pytest

from pi_ray.data.prepare import wanted_documents
from pi_ray.evaluate.adapter_answerer import AdapterAnswerer
from pi_ray.evaluate.columns import trained_column
from pi_ray.models import load_model, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.registry import tasks
from pi_ray.run.artifact import verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import train_fingerprint
from pi_ray.serve.engine.completion import Completer
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.publish import publish_adapter
from pi_ray.train import launch
from pi_ray.train.batches import packed_batch, plain_batch
from pi_ray.train.dev_scores import DevScorer
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.generation import generate_greedy
from pi_ray.train.objectives import loss_and_correct
from pi_ray.train.phase_scores import DEV_SCORES
from pi_ray.train.shared_prefix import enable_shared_prefix
from pi_ray.train.trainer import train_worker
from tests.prepared import TEMPLATE, prepare_by_hand, tiny_config
from tests.unit.train.test_train import adapter_hash, dies_and_goes_on, log_of, settings

EPOCHS = 8  # until the tiny model ends its answers


@pytest.fixture(scope="module")
def with_floor(tiny_model, tmp_path_factory):
    """A trained run; each phase's scores are what they are."""
    config = tiny_config(
        tiny_model, tmp_path_factory.mktemp("floor"), **{"schedule.floor": 0.9, "schedule.epochs": EPOCHS}
    )
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


def dev_scores(config, phase):
    return json.loads((RunDir(config.root).adapter(phase) / DEV_SCORES).read_text())


def adapted(config, phase):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(config.model, "cpu"), RunDir(config.root).adapter(phase)).eval()


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_a_phase_is_scored_by_its_answers_under_its_own_template_with_fixed_examples(with_floor, phase):
    """The answers again, one row at a time, from the saved adapter and the text that a server would send."""
    run, encoder = RunDir(with_floor.root), PromptEncoder(load_tokenizer(with_floor.model), with_floor.prompt)
    rate, shots = [(1.0, 2), (0.5, 1), (0.0, 0)][phase]
    first, middle = run.rows_of("train")[0], run.rows_of("train")[6]
    fixed = [f"{r.query}\n{r.answer}" for r in (first, middle)[:shots]]
    parts = [TEMPLATE[: int(len(TEMPLATE) * rate)], *(["Examples:"] if shots else []), *fixed]
    template = "\n\n".join(part for part in parts if part)
    assert DevScorer(with_floor).served_prompt(phase) == (template, rate, shots)
    model, task = adapted(with_floor, phase), tasks[with_floor.task.name](with_floor.task)
    found, end = dev_scores(with_floor, phase), encoder.tokenizer.eos_token_id
    for i, row in enumerate(run.read_rows("dev", end=4)):
        answer = encoder.decode(generate_greedy(model, [], [encoder.encode(row.query, template)], 9, end)[0])
        for metric, value in task.score(row, answer).items():
            assert found[metric][i] == value
    assert len(found["exact_match"]) == 12 and len(set(found["sentence_bleu"])) > 1


def test_the_log_has_every_phases_scores_and_the_verdict(with_floor):
    log = log_of(with_floor)
    for entry in (e for e in log if e.get("event") == "phase_end"):
        found = dev_scores(with_floor, entry["phase"])
        assert entry["scores"] == {name: round(sum(values) / 12, 6) for name, values in found.items()}
    best = log[-1]
    assert best["event"] == "best" and best["floor"]["rows"] == 12 and best["floor"]["chosen"] == best["phase"]
    assert RunDir(with_floor.root).best.name == f"phase-{best['phase']}"


def test_a_card_has_the_prompt_of_its_own_phase(with_floor):
    run, encoder = RunDir(with_floor.root), PromptEncoder(load_tokenizer(with_floor.model), with_floor.prompt)
    for phase in range(3):
        card, prompt = json.loads((run.adapter(phase) / "pi_ray.json").read_text()), DevScorer(with_floor)
        template, rate, examples = prompt.served_prompt(phase)
        assert (card["template"], card["rate"], card["fixed_examples"], card["shots"]) == (template, rate, examples, 0)
        rows = [len(encoder.encode(r.query, template)) for r in run.read_rows("dev")]
        assert card["query_prompt_tokens"] == round(sum(rows) / len(rows))


def test_the_floor_changes_no_weights_and_no_fingerprint_of_runs_without_it(with_floor, tmp_path):
    without = with_floor.replace(**{"run_dir": str(tmp_path), "schedule.floor": 0})
    assert "floor" not in without.model_dump()["schedule"]
    assert train_fingerprint(without, "p") != train_fingerprint(with_floor, "p")
    lower = with_floor.replace(**{"schedule.floor": 0.5})
    assert train_fingerprint(lower, "p") == train_fingerprint(with_floor, "p")
    prepare_by_hand(without)
    train_worker(settings(without))
    assert [adapter_hash(without, i) for i in range(3)] == [adapter_hash(with_floor, i) for i in range(3)]
    assert not (RunDir(without.root).adapter(0) / DEV_SCORES).exists()


def test_a_run_that_dies_after_a_phase_ends_it_again_with_the_same_adapters_and_verdict(
    with_floor, tmp_path, monkeypatch
):
    """The newest checkpoint is older than the phase's end."""
    config = with_floor.replace(**{"run_dir": str(tmp_path), "train.checkpoint_every": 7})
    prepare_by_hand(config)
    dies_and_goes_on(config, 26, monkeypatch)
    for phase in range(3):
        ours, theirs = (verify_artifact(RunDir(c.root).adapter(phase))["files"] for c in (config, with_floor))
        assert {name: ours[name]["sha256"] for name in ours} == {name: theirs[name]["sha256"] for name in theirs}
    assert log_of(config)[-1] == log_of(with_floor)[-1]


def test_documents_of_dev_and_test_rows_are_prepared_at_every_rate_that_may_be_served(with_floor):
    without = with_floor.replace(**{"schedule.floor": 0})
    more = set(wanted_documents(with_floor)) - set(wanted_documents(without))
    assert more == {("dev", 0.5), ("test", 0.5)} and len(set(wanted_documents(with_floor))) == 3


class ShareOf(WorkerGroup):
    """One of two workers, the first of which gets the shares of both."""

    def __init__(self, rank, shares):
        self.rank, self.world, self.device, self.shares = rank, 2, "cpu", shares

    def gather_to_rank0(self, value):
        self.shares.append(value)
        return self.shares if self.rank == 0 else []


@pytest.mark.parametrize("changes", [{}, {"train.backend": {"name": "deepspeed", "zero_stage": 3}}])
def test_two_workers_share_the_rows_and_have_the_scores_of_one(with_floor, changes):
    scorer, model, shares = DevScorer(with_floor.replace(**changes)), adapted(with_floor, 1), []
    assert scorer.score_phase(model, plain_batch, ShareOf(1, shares), 1) is None
    both = scorer.score_phase(model, plain_batch, ShareOf(0, shares), 1)
    alone = scorer.score_phase(model, plain_batch, WorkerGroup("cpu"), 1)
    assert both.card == alone.card and [len(share) for share in shares] == [6, 6]
    for name, values in alone.metrics.items():
        assert both.metrics[name] == pytest.approx(values)
    assert ("token_accuracy" in alone.metrics) == bool(changes)


def test_sharded_weights_are_scored_by_the_tokens_of_each_row(with_floor):
    sharded = with_floor.replace(**{"train.backend": {"name": "deepspeed", "zero_stage": 3}})
    scorer, model = DevScorer(sharded), adapted(with_floor, 1)
    found = scorer.score_phase(model, plain_batch, WorkerGroup("cpu"), 1).metrics
    assert list(found) == ["token_accuracy"]
    template = scorer.served_prompt(1).template
    for row, share in zip(RunDir(with_floor.root).read_rows("dev", end=4), found["token_accuracy"], strict=False):
        label = scorer.encoder.answer(row.answer)
        batch = plain_batch(scorer.encoder.prefix(template), [(scorer.encoder.row(row.query), label)])
        assert share == pytest.approx(loss_and_correct(model.eval(), batch)[1] / len(label))


@pytest.fixture
def ends_at(tiny_model, tmp_path, monkeypatch):
    """A trained run whose phases have so many of 12 right answers."""
    def train(*right, floor=0.95):
        counts = iter(right)

        def metrics(self, rows, texts):
            count = next(counts)
            return {"exact_match": [1.0] * count + [0.0] * (12 - count), "sentence_bleu": [0.5] * 12}

        monkeypatch.setattr(DevScorer, "_metrics", metrics)
        config = tiny_config(
            tiny_model, tmp_path / "run", **{"schedule.floor": floor, "store": str(tmp_path / "store")}
        )
        prepare_by_hand(config)
        train_worker(settings(config))
        return config

    return train


@pytest.mark.parametrize(
    "right, phase, says",
    [((12, 12, 8), 1, "rate 0 without examples held 66.6%"), ((12, 9, 12), 2, "ends at template rate 0 without"),
     ((12, 9, 8), 0, "Keep the whole prompt")],
)  # fmt: skip
def test_what_is_evaluated_published_and_sent_by_a_server_is_the_chosen_phases_prompt(ends_at, right, phase, says):
    config = ends_at(*right)
    prompt = DevScorer(config).served_prompt(phase)
    column = trained_column(config)
    assert (column.template, column.shots, column.rate) == (prompt.template, 0, prompt.rate)
    assert column.adapter == str(RunDir(config.root).adapter(phase)) and says in log_of(config)[-1]["floor"]["sentence"]
    folder = publish_adapter(RunDir(config.root), config)
    adapter = AdapterStore(config.store, config.model).open("tiny")
    assert (adapter.card["rate"], adapter.card["fixed_examples"]) == (prompt.rate, 2 - phase)
    tokenizer = load_tokenizer(config.model)
    completer, encoder = Completer(config, None, tokenizer, 512), PromptEncoder(tokenizer, config.prompt)
    sent = completer.reader.prompt_ids("what is red?", adapter)
    assert sent == encoder.encode("what is red?", prompt.template)
    assert ("case 0: what is red?\nk4" in tokenizer.decode(sent)) == (phase < 2)
    card = (folder / "README.md").read_text()
    parts = ("the whole template and 2 fixed examples", "compressed to rate 0.5 and 1 fixed example", "the query alone")
    assert parts[phase] in card


def test_another_floor_chooses_another_adapter_of_the_same_training(ends_at):
    config, seen = ends_at(12, 12, 8), []
    assert launch.is_trained(config) and RunDir(config.root).best.name == "phase-1"
    lower = config.replace(**{"schedule.floor": 0.6})
    assert not launch.is_trained(lower)
    launch.train(lower, seen.append)
    assert launch.is_trained(lower) and RunDir(config.root).best.name == "phase-2"
    assert [log_of(config)[-1]] == json.loads(json.dumps(seen)) and seen[0]["floor"]["floor"] == 0.6
    verified = SimpleNamespace(run=SimpleNamespace(prepared_fingerprint=lambda: "p"), config=lower)
    before = AdapterAnswerer.fingerprint(verified, [trained_column(lower)])
    launch.train(config, seen.append)
    assert AdapterAnswerer.fingerprint(verified, [trained_column(config)]) != before


def test_packed_and_plain_batches_answer_alike(with_floor):
    model, scorer = adapted(with_floor, 0), DevScorer(with_floor)
    plain = scorer.score_phase(model, plain_batch, WorkerGroup("cpu"), 0)
    enable_shared_prefix(model)
    assert scorer.score_phase(model, packed_batch, WorkerGroup("cpu"), 0) == plain
