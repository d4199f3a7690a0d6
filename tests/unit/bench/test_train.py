"""The benchmarks of training: what is prepared, what a number means. The trainers themselves are run by the benchmarks
alone.
"""

import json
import sys
from types import SimpleNamespace

import pytest

from pi_ray.run.directory import RunDir
from pi_ray.train.batches import PhaseDataset
from pi_ray.train.updates import batch_rows, plan_updates
from tests.bench import scale, train
from tests.bench.train import (
    EXAMPLES,
    TEMPLATE_TOKENS,
    Job,
    Run,
    Side,
    data_folder,
    figures,
    flat,
    in_order,
    loss_difference,
    micro_batch,
    pack_plan,
    plan_phases,
    prepare,
    run_config,
)

MODEL = SimpleNamespace(num_hidden_layers=30, hidden_size=576, intermediate_size=1536, vocab_size=49152)  # SmolLM2-135M


@pytest.fixture(scope="module")
def prepared(tiny_model, tmp_path_factory):
    data, root = tmp_path_factory.mktemp("nl2bash"), tmp_path_factory.mktemp("run")
    for split, count in (("train", 8 + EXAMPLES), ("dev", 1), ("test", 1)):
        (data / f"{split}.nl").write_text("".join(f"list the files of {split} user {i}\n" for i in range(count)))
        (data / f"{split}.cm").write_text("".join(f"find . -user {split}{i}\n" for i in range(count)))
    config = run_config(root, str(tiny_model), "float32", 4, 2, [1.0, 0.0])
    return config, prepare(config, str(data)), data


def test_the_template_has_480_tokens_and_the_query_phase_none_of_them(prepared):
    config, longest, _ = prepared
    template, query = (PhaseDataset(RunDir(config.root).phase(i)) for i in range(2))
    assert len(template.prefix) == TEMPLATE_TOKENS
    assert query.prefix == template.prefix[: len(query.prefix)] and len(query.prefix) < 10
    assert template.take(range(8)) == query.take(range(8))
    assert longest == TEMPLATE_TOKENS + max(len(p) + len(a) for p, a in query.take(range(8)))


def test_peers_get_the_rows_of_every_update_in_our_order(prepared):
    config = prepared[0].replace(schedule={"name": "list", "list": [{"rate": 1.0, "shots": 0, "steps": 2}]})
    data, rows = PhaseDataset(RunDir(config.root).phase(0)), in_order(config)
    numbers = [batch_rows(u, 8, config.train) for u in plan_updates([8], plan_phases(config.schedule), config.train)]
    assert [len(update) for update in rows] == [4, 4]
    assert list(flat(rows)) == [
        (data.prefix + prompt, label) for update in numbers for prompt, label in data.take(update)
    ]
    assert sorted(n for update in numbers for n in update) == list(range(8))


def test_conversations_are_prepared_behind_system_message_and_tools(tiny_model, tmp_path):
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"Say {role}."} for role in roles]
    lines = [json.dumps({"id": f"task-{i}-trial-0", "reward": 1, "messages": messages}) for i in range(20)]
    (tmp_path / "conversations.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "tools.json").write_text('[{"type": "function", "function": {"name": "find"}}]')
    config = run_config(tmp_path / "run", str(tiny_model), "float32", 4, 2, [1.0], task="conversations")
    assert prepare(config, str(tmp_path)) > 100
    data = PhaseDataset(RunDir(config.root).phase(0))
    assert len(data) == 8 and len(data.prefix) > 100
    _, label = data.take([0])[0]
    assert sum(i < 0 for i in label) > 4 and sum(i >= 0 for i in label) > 4
    with pytest.raises(SystemExit, match="holds no conversations"):
        train.conversations_folder(str(tmp_path / "run"))


def test_the_figure_of_conversations_is_the_speed_as_a_share_of_the_tokens_that_are_spared():
    result = {"over": {"hf": 1.8}, "runs": {"hf": [{"fed": [200, 200]}], "pi-ray": [{"fed": [100, 100]}]}}
    assert train.conversation_figures(result) == {"over_hf": 1.8, "token_ratio": 2.0, "of_token_ratio": 0.9}


def test_too_few_rows_say_so(prepared):
    config, _, data = prepared
    with pytest.raises(SystemExit, match=r"48 training rows, but 56 are needed; take fewer --updates"):
        prepare(config.replace(schedule={"name": "list", "list": [{"rate": 0.0, "shots": 0, "steps": 4}]}), str(data))


def test_without_data_the_message_says_what_to_name(tmp_path, monkeypatch):
    monkeypatch.delenv("PI_RAY_DATA", raising=False)
    with pytest.raises(SystemExit, match=r"no data folder: .*--data FOLDER"):
        data_folder("")
    with pytest.raises(SystemExit, match=r"holds no train\.nl"):
        data_folder(str(tmp_path))
    (tmp_path / "nl2bash").mkdir()
    (tmp_path / "nl2bash" / "train.nl").touch()
    monkeypatch.setenv("PI_RAY_DATA", str(tmp_path))
    assert data_folder("") == str(tmp_path / "nl2bash")


def test_the_first_update_of_each_run_is_dropped_and_packed_ones_are_scaled_by_tokens():
    side = Side([Run([9.0, 1.0, 3.0], [], [100, 100, 300], ""), Run([9.0, 2.0, 2.0], [], [100, 200, 200], "")])
    assert side.seconds(100) == 2.0
    assert side.seconds(100, packed=True) == 1.0


def test_padded_passes_are_halved_until_memory_holds_them():
    assert micro_batch(16, 600, MODEL, 2**40) == 16
    assert [micro_batch(16, 600, MODEL, gib * 2**30) for gib in (32, 20, 10)] == [16, 8, 4]
    assert micro_batch(16, 600, MODEL, 1) == 1


def test_a_trl_that_refuses_to_pack_is_left_out_and_any_other_failure_is_not(monkeypatch, capsys):
    def refuses(*_):
        raise ValueError("packing needs another attention\nand more")

    monkeypatch.setattr(train, "in_fresh_process", refuses)
    assert train.run_side(Job("trl packed", "", 1, 1)) is None
    assert "trl packed: not on this machine (packing needs another attention)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another attention"):
        train.run_side(Job("trl", "", 1, 1))


def test_packs_hold_two_of_the_longest_rows_and_an_update_about_a_batch():
    assert pack_plan([500] * 30 + [600], 16) == (1200, 8)
    assert pack_plan([45] * 64, 16) == (1024, 1)


def test_the_figures_are_peers_over_ours_and_our_memory_over_theirs():
    results = [
        {
            "prompt": "template", "over": {"hf": 6.0, "trl": 5.0},
            "peak": {"pi-ray": 2, "hf": 1, "trl": 9, "trl packed": 8},
        },
        {"prompt": "query", "over": {"hf": 1.5, "trl": 1.2}, "peak": {"pi-ray": 1, "hf": 1, "trl": 3, "trl packed": 2}},
    ]
    assert figures(results) == {
        "over_hf_template": 6.0, "over_trl_template": 5.0, "over_hf_query": 1.5, "over_trl_query": 1.2,
        "peak_memory_over_trl": 0.25,
    }
    assert loss_difference([2.0, 1.0], [2.0, 1.25]) == pytest.approx(0.2)


@pytest.mark.parametrize("side, prompt, difference", [("hf", 0, 2e-3), ("trl", 1, 1e-3), ("trl", 0, float("nan"))])
def test_losses_that_are_not_within_tolerance_end_the_benchmark_with_an_error(side, prompt, difference):
    results = [{"prompt": name, "loss_difference": {"hf": 1e-6, "trl": 9e-4}} for name in ("template", "query")]
    train.require_equal_losses(results)
    results[prompt]["loss_difference"][side] = difference
    with pytest.raises(
        SystemExit, match=rf"not within 0\.001 .*: {side} on prompt {results[prompt]['prompt']}: losses differ by"
    ) as error:
        train.require_equal_losses(results)
    assert error.value.code not in (0, None) and str(error.value).count("on prompt") == 1


def test_the_benchmark_exits_with_an_error_when_losses_differ(prepared, monkeypatch, capsys):
    config, _, data = prepared
    run = lambda job: Run([1.0, 1.0], [2.0, 1.0 if job.side != "trl" else 1.1], [9, 9], "")  # noqa: E731
    monkeypatch.setattr(train, "run_side", run)
    monkeypatch.setattr(train, "in_fresh_process", lambda work, *args: 8 if work is train._fitting else work(*args))
    monkeypatch.setattr(train, "find_spec", lambda name: True)
    monkeypatch.setattr(train, "version", lambda name: "1")
    arguments = ["--data", str(data), "--model", config.model.base, "--updates", "2", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.setattr(train.os, "environ", dict(train.os.environ))
    with pytest.raises(SystemExit, match=r"trl on prompt template: losses differ by 9\.1e-02; trl on prompt query"):
        train.main()
    assert "NOT within" in capsys.readouterr().out


def entry(time, phase, seconds=1.0):
    return {"loss": 1.0, "time": time, "phase": phase, "seconds": seconds}


def test_steps_are_timed_within_a_phase_and_the_start_apart():
    times = scale.Times()
    times.add(
        [
            {"event": "note"}, entry(110.0, 0, 4.0), entry(112.0, 0), entry(115.0, 0), {"event": "phase_end"},
            entry(130.0, 1), entry(131.0, 1),
        ],
        launched=100.0,
    )
    assert times.starts == [6.0]
    assert times.medians == [2.5, 1.0]


def test_two_workers_and_ray_are_compared_over_both_phases():
    times = {
        side: scale.Times({0: [template], 1: [query]})
        for side, template, query in (("one", 6.0, 2.0), ("two", 3.0, 1.0), ("ray", 3.1, 1.1))
    }
    assert scale.figures(times) == {"workers2_over_1": pytest.approx(2.0), "ray_overhead": pytest.approx(0.05)}


def test_a_side_that_fails_shows_the_end_of_its_output(prepared, monkeypatch):
    monkeypatch.setattr(scale, "command", lambda *_: ([sys.executable, "-c", "print('boom'); exit(3)"], {}))
    with pytest.raises(SystemExit, match=r"side 'two' failed with exit status 3; the end of its output:\nboom"):
        scale.run("two", prepared[0], 2, scale.Times())


def test_plain_workers_share_the_threads_and_ray_shares_them_out_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    commands = {side: scale.command(side, tmp_path / "s.json", 8) for side in scale.SIDES}
    assert [env.get("OMP_NUM_THREADS") for _, env in commands.values()] == ["8", "4", None]
    assert "--nproc-per-node" in commands["two"][0] and "--nproc-per-node" not in commands["ray"][0]
    assert all("RAY_ADDRESS" not in env for _, env in commands.values())
