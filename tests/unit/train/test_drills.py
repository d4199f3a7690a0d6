"""Reading drills: variants of the whole prompt and of its labels."""

import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pi_ray.config import DrillsConfig
from pi_ray.models import load_tokenizer
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.train import answer_scores
from pi_ray.train.batches import PhaseDataset, packed_batch
from pi_ray.train.dataloader import TrainDataLoader
from pi_ray.train.distill import view_prefixes
from pi_ray.train.distilled_rows import FILE, SCHEMA, DistilledRows
from pi_ray.train.drills import Drills, exchange_words, keep_part, make_drills, shuffle_lists, template_views
from pi_ray.train.facts import find_facts, shape_of
from pi_ray.train.trainer import train_worker
from pi_ray.train.updates import batch_rows, plan_updates
from tests.prepared import COLOURS, LISTED, prepare_by_hand, tiny_config
from tests.unit.train.test_facts import DESK, ROWS
from tests.unit.train.test_train import adapter_hash, dies_and_goes_on, log_of, settings

FACTS = find_facts(DESK, ROWS)
ALWAYS = DrillsConfig(share=1, kinds=("facts", "order"))


def queues(text):
    """The lines of the queues, in their order."""
    return re.findall(r"^- .*", text, re.M)


def test_a_variant_has_fresh_codes_of_the_same_shape_in_template_and_labels_alike():
    variant = Drills(DESK, FACTS, ALWAYS, 0).variant(3)
    assert set(variant.words) == set(FACTS[0].words)
    assert len(set(variant.words.values())) == 4 and not set(variant.words.values()) & set(variant.words)
    assert all(shape_of(new) == "AA-000" for new in variant.words.values())
    names = {line.split(": ")[1]: line.split(": ")[0] for line in queues(DESK)}
    for old, new in variant.words.items():
        assert f"{names[old]}: {new}" in variant.text and old not in variant.text
        assert variant.apply(f"queue {old}.") == f"queue {new}."
    assert variant.text.split("## Hours")[1].strip() == DESK.split("## Hours")[1].strip()


def test_the_lines_that_hold_the_codes_are_shuffled_and_nothing_else():
    (order_only,) = {Drills(DESK, FACTS, DrillsConfig(share=1, kinds=("order",)), 0).variant(1).text}
    assert sorted(queues(order_only)) == sorted(queues(DESK)) and queues(order_only) != queues(DESK)
    assert re.sub(r"- .*", "", order_only).strip() == re.sub(r"- .*", "", DESK).strip()


def test_lines_that_no_row_needs_are_left_out_as_chance_has_it():
    answers = [f"queue {word}" for word in FACTS[0].words]
    drills = Drills(DESK, FACTS, DrillsConfig(share=1, kinds=("part",)), 0, answers=answers)
    kept = [queues(variant.text) for step in range(60) if (variant := drills.variant(step, [1]))]
    needed = next(line for line in queues(DESK) if FACTS[0].words[1] in line)
    assert all(needed in lines for lines in kept)
    assert {len(lines) for lines in kept} == set(range(1, len(FACTS[0].words) + 1))
    assert all([line for line in queues(DESK) if line in lines] == lines for lines in kept)  # in their order
    assert set().union(*kept) == set(queues(DESK))
    fewest = next(v.text for step in range(60) if len(queues((v := drills.variant(step, [1])).text)) == 1)
    assert re.sub(r"- .*\n", "", fewest) == re.sub(r"- .*\n", "", DESK)  # nothing else is left out
    assert keep_part("Answer politely.", [], set(), random.Random(0)) == "Answer politely."


@pytest.mark.parametrize("kinds", [("unused",), ("facts", "order", "part", "unused")])
def test_lines_whose_codes_no_label_has_are_left_out_of_drilled_and_other_updates(kinds):
    used, unused = (set(words) for words in (FACTS[0].used, set(FACTS[0].words) - set(FACTS[0].used)))
    assert used and unused
    answers = [f"queue {word}" for word in FACTS[0].used]
    for share in (0.5, 1):
        drills = Drills(DESK, FACTS, DrillsConfig(share=share, kinds=kinds), 0, answers=answers)
        variants = [drills.variant(step, [0]) for step in range(40)]
        assert all(variants), "an update that keeps the real codes has a variant too"
        real = [variant for variant in variants if not variant.words]
        assert bool(real) == (share < 1 or "facts" not in kinds)
        for variant in variants:
            shown = queues(variant.text)
            assert 0 < len(shown) <= len(used)
            names = {line.split(": ")[0] for line in queues(DESK) if unused.intersection(line.split())}
            assert names and not names & {line.split(": ")[0] for line in shown}
        for variant in real:
            assert set(queues(variant.text)) <= {line for line in queues(DESK) if not unused & set(line.split())}


def test_variants_are_a_function_of_seed_and_update():
    def texts(seed):
        return [v.text for step in range(6) if (v := Drills(DESK, FACTS, ALWAYS, seed).variant(step))]

    assert texts(0) == texts(0) and len(set(texts(0))) == 6 and texts(0) != texts(1)


@pytest.mark.parametrize("share", [0.25, 0.5, 1])
def test_the_share_of_drilled_updates_is_the_one_asked_for(share):
    drills = Drills(DESK, FACTS, DrillsConfig(share=share, kinds=("facts", "order")), 0)
    drilled = sum(drills.variant(step) is not None for step in range(400))
    assert abs(drilled / 400 - share) < 0.08


def test_codes_of_a_small_alphabet_change_places_with_each_other():
    text = "\n".join(f"item {i}: 1{i}x" for i in range(9)) + "\n" + "\n".join(f"old {i}: 2{i}x" for i in range(60))
    facts = find_facts(text, [("a", "11x"), ("b", "12x")])
    words = Drills(text, facts, ALWAYS, 0).variant(0).words
    assert len(set(words.values())) == len(words) >= 9


def test_words_are_exchanged_whole():
    assert exchange_words("r9, xr9 r9x (r9)", {"r9": "k2"}) == "k2, xr9 r9x (k2)"


def test_views_differ_in_the_order_of_lists_alone():
    views = template_views(DESK, FACTS, 3, 0)
    assert views[0] == DESK and len(views) == 3
    assert all(sorted(queues(view)) == sorted(queues(DESK)) for view in views)


def test_without_facts_views_shuffle_lists_of_all_kinds_but_steps_and_table_heads():
    text = (
        "Rules:\n- be short\n- be kind\n- be right\n\n1. read\n2. think\n3. answer\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |"
    )
    moved = {shuffle_lists(text, [], random.Random(i)) for i in range(20)}
    assert len(moved) > 5
    for view in moved:
        assert "1. read\n2. think\n3. answer" in view and "| a | b |\n|---|---|" in view
        assert sorted(view.split("\n")) == sorted(text.split("\n"))


def test_a_template_without_lists_has_one_view():
    assert template_views("Answer politely.\n\nBe short.", [], 3, 0) == ["Answer politely.\n\nBe short."]


@pytest.fixture(scope="module")
def drilled(tiny_model, tmp_path_factory):
    changes = {"train.objective": "distill", "schedule.shots": 0, "schedule.epochs": 2}
    half = {"train.drills": {"kinds": ["facts", "order"], "share": 0.5}, "train.distill.known_confidence": None}
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("drilled"), **changes, **half)
    prepare_by_hand(config, whole=LISTED)
    train_worker(settings(config))
    return config


def with_own_folder(config, folder, **changes):
    other = config.replace(run_dir=str(folder), **changes)
    prepare_by_hand(other, whole=LISTED)
    return other


def test_a_drilled_update_has_the_variant_before_its_rows_and_its_codes_as_labels(drilled):
    phases = plan_phases(drilled.schedule)
    updates = plan_updates([12] * len(phases), phases, drilled.train)
    loader = TrainDataLoader(drilled, "by-hand", updates, packed_batch)
    plain = PhaseDataset(RunDir(drilled.root).phase(0))
    tokenizer, drills = load_tokenizer(drilled.model), make_drills(drilled)
    kinds = set()
    for update in updates[: sum(update.phase == 0 for update in updates)]:
        made, variant = loader[update], drills.variant(update.step, batch_rows(update, len(plain), drilled.train))
        (((batch, targets),),) = made.parts
        assert targets is None and made.answer_tokens == len(batch.labels)
        text, labels = tokenizer.decode(batch.inputs["input_ids"][0]), tokenizer.decode(batch.labels)
        kinds.add(variant is None)
        if variant:
            assert variant.text in text and any(code in labels for code in variant.words.values())
            assert not any(code in labels for code in COLOURS.values())
        else:
            assert batch.inputs["input_ids"][0, : len(plain.prefix)].tolist() == plain.prefix
            assert any(code in labels for code in COLOURS.values())
    loader.close()
    assert kinds == {True, False}


def test_a_drilled_update_keeps_the_lines_that_its_rows_need(drilled):
    config = drilled.replace(**{"train.drills": {"share": 1, "kinds": ["part"]}})
    phases = plan_phases(config.schedule)
    updates = plan_updates([12] * len(phases), phases, config.train)
    loader, tokenizer = TrainDataLoader(config, "by-hand", updates, packed_batch), load_tokenizer(config.model)
    sizes = []
    for update in updates[: sum(update.phase == 0 for update in updates)]:
        (((batch, _),),) = loader[update].parts
        ids, labels = batch.inputs["input_ids"][0], tokenizer.decode(batch.labels)
        prefix = tokenizer.decode(ids[: batch.inputs["layout"].prefix])
        assert all(code in prefix for code in COLOURS.values() if code in labels)
        sizes.append(sum(code in prefix for code in COLOURS.values()))
    loader.close()
    assert min(sizes) < len(COLOURS)


def test_a_drilled_run_that_dies_ends_with_the_same_adapter_and_without_drills_with_another(
    drilled, tmp_path, monkeypatch
):
    again = with_own_folder(drilled, tmp_path / "again")
    dies_and_goes_on(again, 3, monkeypatch)
    assert adapter_hash(again) == adapter_hash(drilled)
    without = with_own_folder(drilled, tmp_path / "without", **{"train.drills.mode": "off"})
    train_worker(settings(without))
    assert adapter_hash(without) != adapter_hash(drilled)


def test_the_log_says_what_is_drilled_or_nothing_where_there_are_no_drills(drilled, tmp_path):
    (said,) = [e for e in log_of(drilled) if e.get("event") == "drills"]
    assert said["facts"] == ["4 codes under '## Colours' (k4, z9, q1, b7), 4 of them in labels"]
    assert make_drills(drilled.replace(**{"train.objective": "sft"})) is None
    assert make_drills(drilled.replace(**{"schedule.shots": 1})) is None
    prose = drilled.replace(run_dir=str(tmp_path))
    prepare_by_hand(prose)
    assert make_drills(prose) is None


def test_the_teacher_reads_the_prompt_in_several_orders_and_notes_where_they_agree(drilled):
    first, second = view_prefixes(drilled)
    assert first == PhaseDataset(RunDir(drilled.root).phase(0)).prefix and sorted(first) == sorted(second) != first
    rows = pq.read_table(RunDir(drilled.root).teacher_answers / FILE).to_pylist()
    assert {row["agreement"] for row in rows} <= {0.0, 0.5, 1.0}
    (said,) = [e for e in log_of(drilled) if e.get("event") == "teacher_answers"]
    own = [row for row in rows if not row["labelled"]]
    assert said["views"] == 2 and said["kept"] == sum(row["agreement"] == 1 for row in own)


class Reader(torch.nn.Module):
    """Gives every token the logits of the first token of its prefix."""

    device = "cpu"

    def forward(self, input_ids, logits_to_keep, **_):
        logits = torch.zeros(1, len(logits_to_keep), 30)
        logits[..., int(input_ids[0, 0])] = 4.0
        return type("Output", (), {"logits": logits})


def test_distributions_are_averaged_over_views_and_agreement_is_the_share_that_gives_the_answer(drilled):
    data = PhaseDataset(RunDir(drilled.root).phase(0))
    answers = {0: [5], 1: [9], 2: [5, 5]}
    rows = list(answer_scores.score_answers(Reader(), packed_batch, [[5], [9]], data, answers, 2, 2))
    assert [row["agreement"] for row in rows] == [0.5, 0.5, 0.5]
    both = [torch.log_softmax(torch.nn.functional.one_hot(torch.tensor(t), 30) * 4.0, -1)[5] for t in (5, 9)]
    expected = torch.stack(both).exp().mean().log().item()
    assert [row["confidence"] for row in rows] == pytest.approx([expected] * 3, abs=1e-5)
    assert set(rows[0]["top_ids"]) == {5, 9}
    (sure,) = answer_scores.score_answers(Reader(), packed_batch, [[5], [5]], data, {0: [5]}, 2, 2)
    assert sure["agreement"] == 1.0


@pytest.mark.parametrize(("agreement", "kept"), [("filter", 1), ("weight", 2), ("off", 2)])
def test_answers_on_which_views_differ_are_left_out_or_count_less(drilled, tmp_path, agreement, kept):
    run = RunDir(drilled.root)
    config = drilled.replace(**{"train.distill.agreement": agreement}).train
    table = pq.read_table(run.teacher_answers / FILE).slice(0, 2).to_pylist()
    rows = [{**row, "labelled": False, "agreement": share} for row, share in zip(table, (1.0, 0.5), strict=True)]
    with staged(tmp_path / "answers", fingerprint="x", top_k=16) as folder:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / FILE)
    queries = PhaseDataset(run.phase("unlabelled-1"))
    data = DistilledRows(tmp_path / "answers", PhaseDataset(run.phase(1)), queries, config)
    assert len(data) == kept
    weights = data.targets(list(range(kept))).weights
    assert set(weights.tolist()) == ({1.0, 0.5} if agreement == "weight" else {1.0})


@pytest.mark.parametrize("heading", ["## Runbooks of release QX-100\n\n", ""], ids=["code in heading", "no heading"])
def test_the_first_line_of_a_section_keeps_its_place_and_may_be_left_out_where_it_is_no_heading(heading):
    lines = [f"queue {i}: AB-{i}00" for i in range(1, 7)]
    text = "Answer.\n\n" * bool(heading) + heading + "\n".join(lines)
    groups = find_facts(text, [("q", f"AB-{i}00") for i in (1, 3, 4, 5)])
    assert groups and "QX-100" not in groups[0].words
    for view in template_views(text, groups, 4, 0)[1:]:
        assert view.startswith(text[: len(text) - len("\n".join(lines))]) and sorted(view) == sorted(text)
    drills = Drills(text, groups, DrillsConfig(share=1, kinds=("part", "order", "facts")), 0, answers=["AB-300"] * 3)
    variants = [drills.variant(step, [1]) for step in range(30)]
    assert all(variant.words["AB-300"] in variant.text for variant in variants)
    assert len({variant.text.count("queue") for variant in variants}) > 3, "lines are left out"
    assert len({re.findall("queue (.):", variant.text)[0] for variant in variants}) > 2, "the first one too"
    if heading:
        assert all("## Runbooks of release QX-100" in variant.text for variant in variants)


def test_a_row_that_is_twice_in_an_update_counts_twice(drilled):
    phases = plan_phases(drilled.schedule)
    twice = drilled.replace(**{"train.batch_size": 16, "train.drills.share": 1.0})
    updates = plan_updates([12] * len(phases), phases, twice.train)
    loader = TrainDataLoader(twice, "by-hand", updates, packed_batch)
    made = loader[updates[0]]
    assert len(set(batch_rows(updates[0], 12, twice.train))) < 16
    assert made.answer_tokens == sum(int((batch.labels != -100).sum()) for ((batch, _),) in made.parts)
    loader.close()
