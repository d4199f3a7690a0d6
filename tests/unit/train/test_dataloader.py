"""The data loader: batches are ready before they are asked for, at phase transitions too."""

import threading

import pytest
import torch

from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.train import dataloader
from pi_ray.train.batches import PhaseDataset, packed_batch, plain_batch
from pi_ray.train.updates import batch_rows, plan_updates
from tests.prepared import prepare_by_hand, tiny_config


@pytest.fixture
def prepared(tiny_model, tmp_path):
    """Three phases of twelve rows, three updates of four rows each."""
    config = tiny_config(tiny_model, tmp_path)
    prepare_by_hand(config)
    return config, plan_updates([12] * 3, plan_phases(config.schedule), config.train)


@pytest.fixture
def opened(monkeypatch):
    """(folder, whether the main thread waited for it) of each dataset that was opened; `ready` is set when it is phase
    1's.
    """
    seen, ready = [], threading.Event()

    class Noted(PhaseDataset):
        def __init__(self, folder):
            super().__init__(folder)
            seen.append((folder.name, threading.current_thread() is threading.main_thread()))
            if folder.name == "1":
                ready.set()

    monkeypatch.setattr(dataloader, "PhaseDataset", Noted)
    seen_and_ready = (seen, ready)
    return seen_and_ready


def test_the_next_phases_rows_are_read_while_the_present_phase_trains(prepared, opened):
    config, updates = prepared
    seen, ready = opened
    loader = dataloader.TrainDataLoader(config, "f", updates, packed_batch)
    loader[updates[0]]
    assert ready.wait(10), "phase 1 is opened though no update of it was asked for"
    for update in updates:
        loader[update]
    assert seen == [("0", False), ("1", False), ("2", False)]
    loader.close()


def test_the_first_batch_of_the_next_phase_is_made_before_the_phase_transition(prepared, monkeypatch):
    config, updates = prepared
    made, first = [], threading.Event()
    make = dataloader.TrainDataLoader._make

    def noted(self, step):
        made.append(step)
        if step == 3:
            first.set()
        return make(self, step)

    monkeypatch.setattr(dataloader.TrainDataLoader, "_make", noted)
    loader = dataloader.TrainDataLoader(config, "f", updates, packed_batch)
    loader[updates[2]]
    assert first.wait(10) and updates[3].phase == 1 and 4 not in made
    loader.close()


def test_each_worker_has_its_rows_in_micro_batches_and_all_count_the_same_answers(prepared):
    config, updates = prepared
    config = config.replace(**{"train.workers": 2, "train.micro_batch": 1})
    data = PhaseDataset(RunDir(config.root).phase(1))
    rows = batch_rows(updates[4], len(data), config.train)
    for rank in range(2):
        update_batches = dataloader.TrainDataLoader(config, "f", updates, packed_batch, rank, 2)[updates[4]]
        assert update_batches.answer_tokens == sum(len(label) for _, label in data.take(rows))
        for ((batch, targets),), number in zip(update_batches.parts, rows[rank::2], strict=True):
            assert targets is None and torch.equal(
                batch.inputs["input_ids"], packed_batch(data.prefix, data.take([number])).inputs["input_ids"]
            )


def test_plain_batches_hold_rows_of_about_one_length_and_packed_ones_need_not(prepared):
    config, _ = prepared
    config = config.replace(**{"train.workers": 2, "train.batch_size": 12, "train.micro_batch": 2})
    update = plan_updates([12] * 3, plan_phases(config.schedule), config.train)[2]
    data = PhaseDataset(RunDir(config.root).phase(2))
    order = batch_rows(update, 12, config.train)
    length = lambda n: len(data.prefix) + len(data.take([n])[0][0]) + len(data.take([n])[0][1]) - 1  # noqa: E731
    padded = lambda rows: sum(2 * max(map(length, rows[rank::2][i : i + 2])) for rank in range(2) for i in (0, 2, 4))  # noqa: E731
    found = {}
    for pack in (plain_batch, packed_batch):
        updates = plan_updates([12] * 3, plan_phases(config.schedule), config.train)
        found[pack] = [
            part
            for rank in range(2)
            for ((part, _),) in dataloader.TrainDataLoader(config, "f", updates, pack, rank, 2)[update].parts
        ]
    assert sum(part.tokens for part in found[plain_batch]) == padded(sorted(order, key=length)) < padded(order)
    assert torch.cat([part.labels for part in found[packed_batch]]).tolist() == [
        token for rank in range(2) for _, label in data.take(order[rank::2]) for token in label
    ]
    given = [
        sorted(token for part in parts for token in part.labels.tolist() if token != -100) for parts in found.values()
    ]
    assert given[0] == given[1], "the same rows"


def test_rows_that_a_teacher_is_to_answer_first_are_not_read_before_it_has(prepared, opened):
    config, updates = prepared
    config = config.replace(**{"train.objective": "distill"})
    loader = dataloader.TrainDataLoader(config, "f", updates, packed_batch)
    for update in updates[:3]:
        loader[update]
    assert [name for name, _ in opened[0]] == ["0"] and not loader.has_answers
    loader.close()
