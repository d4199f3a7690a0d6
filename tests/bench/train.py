"""Training against Hugging Face Trainer + peft and against TRL: the same rows, model, LoRA, learning rates and updates,
all in one run.

    python -m tests.bench.train --data NL2BASH_FOLDER [--updates 4] [--model smollm2-135m] [--batch 16] [--dtype
    float32] [--out FILE]
    python -m tests.bench.train --data TAU_AIRLINE_FOLDER --batch 4 conversations

Two prompts: `template` (480 tokens that all rows share, then query and answer) and `query` (no template, as in the last
phase). Sides:

    pi-ray      the training worker as it is: packed rows behind one shared prefix, plain data parallelism, one process
    hf          transformers.Trainer + peft: padded rows, labels on the answer alone, its own optimiser, SDPA attention
    trl         TRL SFTTrainer with completion-only loss on the same token ids, without packing
    trl packed  the same with packing (best fit, which keeps rows apart); the faster of the two is the peer

Each side runs in a process of its own, in turn; the first update of each is dropped, and the median of all rounds is
taken. A packed update holds other rows than 16 in a row, so its seconds are scaled by tokens to those of 16 mean rows.
Without CUDA, TRL's loss runs the output layer on all positions, as Trainer's does; with CUDA on the labelled ones, as
pi-ray's does everywhere. Last line: `over_*` is the peer's seconds over pi-ray's; `peak_memory_over_trl` is pi-ray's
peak memory over TRL's, each the larger of both prompts, and of TRL the leaner of its two ways.

With `conversations`, rows are tau-bench's (jobs/data/tau_airline.py), of which every assistant turn is learned, behind
a policy and 14 tools of about 4,100 tokens; both sides use gradient checkpointing, and the peer is Trainer. Last line:
`of_token_ratio` is the peer's seconds over pi-ray's, as a share of the peer's tokens over pi-ray's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pi_ray.config import RunConfig, TaskConfig
from pi_ray.models import load_model, load_tokenizer
from pi_ray.models.base_files import resolve_base
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Row
from pi_ray.run.artifact import digest, staged
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.tasks.conversations import ConversationsTask
from pi_ray.tasks.nl2bash import Nl2BashTask
from pi_ray.train import lora
from pi_ray.train.batches import PhaseDataset, fed_ids, packed_batch
from pi_ray.train.updates import batch_rows, plan_updates
from tests.bench.report import header, last_line

TEMPLATE_TOKENS, EXAMPLES = 480, 40  # tokens of the shared prefix; rows that fill it up after the task's own template
SHORTER = 0.75  # share of the conversations that are taken, the shortest: the longest ones do not fit behind the tools
PROMPTS = {"template": 1.0, "query": 0.0}  # name -> template rate
QUERY_ROUNDS = 3  # rounds without a template for one with it: they are short, and their ratios near 1
LOSS_TOLERANCE = 1e-3  # relative, of the losses of two sides at the same update
Ids = tuple[list[int], list[int]]  # prompt ids (with the template), label ids


@dataclass(frozen=True)
class Job:
    """The settings of one side's process. `micro`: rows of one forward pass of an unpacked peer."""

    side: str
    config: str
    threads: int
    micro: int


@dataclass
class Run:
    """The measurements of one process, an entry for each update. `fed`: tokens through the model; `lora`: hash of the
    adapter before training.
    """

    seconds: list[float]
    losses: list[float]
    fed: list[int]
    lora: str
    peak: int = 0  # bytes
    note: str = ""


@dataclass
class Side:
    """All rounds of one side on one prompt."""

    runs: list[Run] = field(default_factory=list)

    def seconds(self, tokens: float, packed: bool = False) -> float:
        """Median seconds of an update after the first; packed updates are scaled to `tokens`."""
        return median(
            s * tokens / n if packed else s
            for run in self.runs
            for s, n in list(zip(run.seconds, run.fed, strict=True))[1:]
        )

    @property
    def peak(self) -> int:
        return max(run.peak for run in self.runs)


# Rows


def conversations_folder(given: str) -> str:
    if not given or not (Path(given) / "conversations.jsonl").is_file():
        raise SystemExit(f"'{given}' holds no conversations.jsonl: name tau-bench's airline folder with --data FOLDER")
    return given


def data_folder(given: str) -> str:
    folder = given or (os.environ.get("PI_RAY_DATA") and str(Path(os.environ["PI_RAY_DATA"]) / "nl2bash"))
    if not folder or not (Path(folder) / "train.nl").is_file():
        said = f"'{folder}' holds no train.nl" if folder else "no data folder"
        raise SystemExit(
            f"{said}: name the NL2Bash folder (train, dev and test, each as .nl and .cm) with --data FOLDER, or set "
            "PI_RAY_DATA to the folder that "
            "holds nl2bash. It is published on GitHub as TellinaTool/nl2bash"
        )
    return folder


def run_config(
    root: Path, model: str, dtype: str, batch: int, updates: int, rates: Sequence[float], task: str = "jsonl",
    **train: Any,
) -> RunConfig:
    """A run of `updates` updates at each template rate, with pi-ray's defaults for LoRA and learning rate."""
    return RunConfig.model_validate({
        "name": "bench", "run_dir": str(root), "task": {"name": task}, "model": {"base": model, "dtype": dtype},
        "prompt": {"chat": "chatml"},
        "schedule": {"name": "list", "list": [{"rate": rate, "shots": 0, "steps": updates} for rate in rates]},
        "train": {"workers": 1, "gpu": False, "batch_size": batch, "backend": {"name": "ddp"}, **train},
    })


def prepare(config: RunConfig, data: str) -> int:
    """Write the datasets of all phases as `pi-ray prepare` does, and convert the model if needed. Returns the tokens of
    the longest row.
    """
    resolve_base(config.model.base)
    phases = plan_phases(config.schedule)
    need = max(p.steps for p in phases) * config.train.batch_size
    encoder, run = PromptEncoder(load_tokenizer(config.model), config.prompt), RunDir(config.root)
    full, table = (conversation_rows if config.prompt.conversation else query_rows)(encoder, data, need)
    tokens = None if config.prompt.conversation else TEMPLATE_TOKENS
    for i, phase in enumerate(phases):
        prefix = encoder.prefix(full)[:tokens] if phase.rate else encoder.prefix("")
        _write(run.phase(i), phase.rate, full if phase.rate else "", prefix, table)
    _write(
        run.phase("dev"), phase.rate, full if phase.rate else "", prefix,
        {name: column[:16] for name, column in table.items()},
    )
    longest = max(
        len(prompt) + len(label) for prompt, label in zip(table["prompt_ids"], table["label_ids"], strict=True)
    )
    return longest + len(encoder.prefix(full)[:tokens] if phases[0].rate else prefix)


def query_rows(encoder: PromptEncoder, data: str, need: int) -> tuple[str, dict[str, list[Any]]]:
    """A template that is filled up with examples, and the token ids of NL2Bash's rows."""
    task = Nl2BashTask(TaskConfig(name="nl2bash", folder=data, rows={"train": need + EXAMPLES}))
    rows = [row for row in task.rows("train") if isinstance(row, Row)]
    if len(rows) < need + EXAMPLES:
        raise SystemExit(f"{data}: {len(rows)} training rows, but {need + EXAMPLES} are needed; take fewer --updates")
    full = "\n\n".join([task.template().text, *(f"{row.query}\n{row.answer}" for row in rows[need:])])
    return full, {
        "id": [r.id for r in rows[:need]], "prompt_ids": [encoder.row(r.query) for r in rows[:need]],
        "label_ids": [encoder.answer(r.answer) for r in rows[:need]],
    }


def conversation_rows(encoder: PromptEncoder, data: str, need: int) -> tuple[str, dict[str, list[Any]]]:
    """The system message with the tools, and the token ids of tau-bench's shorter training conversations."""
    from jobs.data.tau_airline import convert

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        convert(Path(data), made)
        paths = {"train": "train.jsonl", "template": "template.md", "tools": "tools.json"}
        named = {key: str(made / name) for key, name in paths.items()}
        task = ConversationsTask(TaskConfig(name="conversations", **named))
        rows = sorted((row for row in task.rows("train") if isinstance(row, Row)), key=lambda row: len(row.query))
        full = task.template().text
    rows = rows[: int(SHORTER * len(rows))]
    if len(rows) < need:
        raise SystemExit(f"{data}: {len(rows)} conversations, but {need} are needed; take fewer --updates")
    turns = [encoder.all_turns(row.query, row.answer) for row in rows[-need:]]
    ids, prompts, labels = ([row.id for row in rows[-need:]], *map(list, zip(*turns, strict=True)))
    return full, {"id": ids, "prompt_ids": prompts, "label_ids": labels}


def _write(folder: Path, rate: float, template: str, prefix: list[int], table: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompts, labels = ([len(ids) for ids in table[name]] for name in ("prompt_ids", "label_ids"))
    tokens = {
        "prefix": len(prefix), "row_mean": sum(prompts) / len(prompts), "row_max": max(prompts),
        "label_mean": sum(labels) / len(labels), "label_max": max(labels),
    }
    facts = {
        "phase": {"rate": rate, "shots": 0}, "template": template, "prefix_ids": prefix, "rows": len(prompts),
        "tokens": tokens,
    }
    with staged(folder, fingerprint="bench", **facts) as tmp:
        pq.write_table(pa.table(table), tmp / "part-00000.parquet")


def in_order(config: RunConfig) -> list[list[Ids]]:
    """The rows of each update, in pi-ray's order, with the template's tokens in front of every prompt."""
    data = PhaseDataset(RunDir(config.root).phase(0))
    updates = plan_updates([len(data)], plan_phases(config.schedule), config.train)
    return [
        [(data.prefix + prompt, label) for prompt, label in data.take(batch_rows(u, len(data), config.train))]
        for u in updates
    ]


def micro_batch(batch: int, row_tokens: int, model: Any, available: int) -> int:
    """Rows of one padded forward pass that fit into `available` bytes. A token of SmolLM2-135M takes 2.1 MB until
    backward is done (measured), so 16 rows take 20 GB.
    """
    saved = model.num_hidden_layers * (8 * model.hidden_size + 5 * model.intermediate_size) + 3 * model.vocab_size
    while batch % 2 == 0 and batch * row_tokens * saved * 4 > 0.7 * available:
        batch //= 2
    return batch


# Sides


def measure(job: Job) -> Run:
    """Run one side from a cold start, in a process of its own. Memory is the process's, or the GPU's when there is
    one.
    """
    torch.set_num_threads(job.threads)
    config = RunConfig.model_validate_json(job.config)
    return pi_ray(config) if job.side == "pi-ray" else peer(config, job)


def peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def adapter_hash(model: Any) -> str:
    return digest(
        b"".join(p.detach().float().cpu().numpy().tobytes() for p in lora.trainable_parameters(model).values())
    )


def pi_ray(config: RunConfig) -> Run:
    from pi_ray.train.trainer import Trainer

    worker = Trainer(config, "bench", device(), None)
    start, seconds = adapter_hash(worker.backend.model), []
    for update in worker.updates:
        started = time.perf_counter()
        worker.train_step(update)
        seconds.append(time.perf_counter() - started)
    entries = [json.loads(line) for line in RunDir(config.root).train_log.read_text().splitlines()][-len(seconds):]
    note = "" if worker.pack is packed_batch else "no shared prefix: this model cannot take packed rows"
    return Run(seconds, [e["loss"] for e in entries], [e["tokens"] for e in entries], start, peak_memory(), note)


def peer(config: RunConfig, job: Job) -> Run:
    """One of the trainers on the rows of `in_order`, with the model and the adapter that pi-ray starts from."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    tokenizer, model = load_tokenizer(config.model), load_model(config.model, device())
    model = lora.add_lora(model, config.train.lora, config.train.seed).train()
    if config.train.gradient_checkpointing:
        model.enable_input_require_grads()
    start, rows = adapter_hash(model), in_order(config)
    with tempfile.TemporaryDirectory() as folder:
        build = {"hf": hf, "trl": trl, "trl packed": trl_packed}[job.side]
        trainer, note = build(config, model, tokenizer, rows, {**arguments(config, job.micro), "output_dir": folder})
        trainer.remove_callback(transformers.PrinterCallback)
        clock = _clock()
        trainer.add_callback(clock)
        trainer.train()
    peak = peak_memory()
    if job.side == "trl packed":
        rows_in_pack = len(trainer.train_dataset[0]["seq_lengths"])
        note += f"; the {rows_in_pack} rows of the first one by one: loss differs by {_leak(trainer):.1e}"
    return Run(
        clock.seconds, [e["loss"] for e in trainer.state.log_history if "loss" in e], trainer.fed, start, peak, note
    )


def arguments(config: RunConfig, micro: int) -> dict[str, Any]:
    """Arguments of both trainers: pi-ray's updates, float32 or bfloat16 as the weights are, and nothing that costs time
    besides training.
    """
    train = config.train
    return {
        "max_steps": sum(p.steps for p in plan_phases(config.schedule)), "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": train.batch_size // micro, "learning_rate": train.lr,
        "weight_decay": train.weight_decay, "max_grad_norm": train.grad_clip, "seed": train.seed,
        "gradient_checkpointing": train.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": False, "fp16": False, "use_cpu": device() == "cpu",
        "dataloader_num_workers": 0, "dataloader_pin_memory": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True,
    }


def hf(
    config: RunConfig, model: Any, tokenizer: Any, rows: list[list[Ids]], options: dict[str, Any]
) -> tuple[Any, str]:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    examples = [
        {
            "input_ids": prompt + fed_ids(label), "attention_mask": [1] * len(prompt + label),
            "labels": [-100] * len(prompt) + [i if i >= 0 else -100 for i in label],
        }
        for prompt, label in flat(rows)
    ]
    trainer = _measured(Trainer, config)(
        model=model, args=TrainingArguments(**options, remove_unused_columns=False), train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return trainer, _passes(options)


def trl(
    config: RunConfig, model: Any, tokenizer: Any, rows: list[list[Ids]], options: dict[str, Any], **packing: Any
) -> tuple[Any, str]:
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    examples = [
        {"input_ids": prompt + label, "completion_mask": [0] * len(prompt) + [1] * len(label)}
        for prompt, label in flat(rows)
    ]
    args = SFTConfig(**{**options, "completion_only_loss": True, "max_length": None, **packing})
    trainer = _measured(SFTTrainer, config)(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(examples), processing_class=tokenizer
    )
    return trainer, _passes(options)


def trl_packed(
    config: RunConfig, model: Any, tokenizer: Any, rows: list[list[Ids]], options: dict[str, Any]
) -> tuple[Any, str]:
    """Best-fit packs, one a forward pass: rows see themselves only (transformers masks by position ids), at the price
    of a mask over the whole pack.
    """
    length, passes = pack_plan([len(prompt) + len(label) for prompt, label in flat(rows)], config.train.batch_size)
    packing = {
        "packing": True, "packing_strategy": "bfd", "max_length": length, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": passes,
    }
    trainer, _ = trl(config, model, tokenizer, rows, options, **packing)
    return trainer, f"packs of up to {length} tokens, {passes} an update"


def pack_plan(lengths: list[int], batch: int) -> tuple[int, int]:
    """(tokens of a pack, packs of an update of about `batch` rows): TRL's default length, or more where it would not
    hold two rows.
    """
    length = max(1024, 2 * max(lengths))
    held = length // (sum(lengths) / len(lengths))
    return length, max(1, round(batch / held))


def flat(rows: list[list[Ids]]) -> Iterator[Ids]:
    return (row for update in rows for row in update)


def _passes(options: dict[str, Any]) -> str:
    n = options["gradient_accumulation_steps"]
    return f"{n} passes of {options['per_device_train_batch_size']} rows" if n > 1 else ""


def _measured(trainer: type, config: RunConfig) -> type:
    """The trainer, with rows in their order and pi-ray's learning rates, which counts the tokens of each update.
    Optimiser and loss stay its own.
    """
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import SequentialSampler

    phases = plan_phases(config.schedule)
    rates = [
        u.lr / config.train.lr for u in plan_updates([phases[0].steps * config.train.batch_size], phases, config.train)
    ]

    class Measured(trainer):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            self.fed = [*getattr(self, "fed", []), *[0] * (self.state.global_step + 1 - len(getattr(self, "fed", [])))]
            self.fed[-1] += inputs["input_ids"].numel()
            return super().training_step(model, inputs, *rest, **named)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: rates[min(step, len(rates) - 1)])
            return self.lr_scheduler

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    return Measured


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.seconds, self.last = [], time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

    return Clock()


@torch.no_grad()
def _leak(trainer: Any) -> float:
    """The relative difference between the loss of the first pack and that of its rows one by one."""
    pack = trainer.train_dataset[0]

    def loss(example: dict[str, Any]) -> float:
        inputs = {
            k: v.to(trainer.model.device)
            for k, v in trainer.data_collator([example]).items()
            if k in ("input_ids", "position_ids", "labels")
        }
        labels = inputs.pop("labels")[0, 1:]
        return torch.nn.functional.cross_entropy(
            trainer.model(**inputs, use_cache=False).logits[0, :-1].float(), labels, reduction="sum"
        ).item()

    ids, labels = iter(pack["input_ids"]), iter(pack["labels"])
    alone = sum(
        loss({"input_ids": list(islice(ids, n)), "labels": list(islice(labels, n)), "seq_lengths": [n]})
        for n in pack["seq_lengths"]
    )
    return abs(loss(pack) - alone) / alone


# The run


def in_fresh_process(work: Any, *args: Any) -> Any:
    """The result of `work` in a fresh process, so that its memory is its own and nothing stays warm."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def run_side(job: Job) -> Run | None:
    """Run one side; None when TRL refuses to pack on this machine."""
    try:
        return in_fresh_process(measure, job)
    except Exception as error:
        if job.side != "trl packed":
            raise
        print(f"    trl packed: not on this machine ({str(error).strip().splitlines()[0]})", flush=True)
        return None


def loss_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of two sides' losses; NaN where one of them is."""
    return float(torch.tensor([abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]).max())


def compare(
    config: RunConfig, name: str, rounds: int, threads: int, micro: int,
    peers: Sequence[str] = ("hf", "trl", "trl packed"),
) -> dict[str, Any]:
    """All sides on one prompt, alternating; prints them and returns what was measured."""
    rows = in_order(config)
    tokens = sum(len(prompt) + len(label) for prompt, label in flat(rows)) / len(rows)
    batch, prefix = len(rows[0]), len(PhaseDataset(RunDir(config.root).phase(0)).prefix)
    print(
        f"  {name}: {batch} rows of {prefix} + {tokens / batch - prefix:.0f} tokens an update, {len(rows)} updates, "
        f"{rounds} round(s)",
        flush=True,
    )
    sides = {side: Side() for side in ("pi-ray", *peers)}
    for _ in range(rounds):
        for side, found in sides.items():
            if run := run_side(Job(side, config.model_dump_json(), threads, micro)):
                found.runs.append(run)
    sides = {side: found for side, found in sides.items() if found.runs}
    if len({run.lora for found in sides.values() for run in found.runs}) > 1:
        raise SystemExit("the sides started from different adapters")
    seconds = {side: found.seconds(tokens, side == "trl packed") for side, found in sides.items()}
    for side, found in sides.items():
        run = found.runs[0]
        print(
            f"    {side:10}  {seconds[side]:8.3f} s an update  {tokens / seconds[side]:7.0f} tokens/s  "
            f"{sum(run.fed) / len(run.fed):6.0f} through the model  "
            f"peak {found.peak / 2**30:5.2f} GiB  loss {run.losses[0]:.5f} -> {run.losses[-1]:.5f}"
            + (f"  ({run.note})" if run.note else ""),
            flush=True,
        )
    ours, differences = sides["pi-ray"].runs[0].losses, {}
    for side in (side for side in ("hf", "trl") if side in sides):
        differences[side] = loss_difference(ours, sides[side].runs[0].losses)
        print(
            f"    losses against {side}: largest relative difference {differences[side]:.1e}, "
            f"{'within' if differences[side] < LOSS_TOLERANCE else 'NOT within'} {LOSS_TOLERANCE:g}"
        )
    fastest = min((side for side in sides if side.startswith("trl")), key=lambda side: seconds[side], default="")
    named = {"hf": "hf", **({"trl": fastest} if fastest else {})}
    over = {peer: seconds[side] / seconds["pi-ray"] for peer, side in named.items()}
    said = ", ".join(f"{over[peer]:.2f} times as fast as {side}" for peer, side in named.items())
    print(f"    pi-ray is {said}", flush=True)
    return {
        "prompt": name, "tokens": tokens, "seconds": seconds, "over": over, "trl_peer": fastest,
        "loss_difference": differences, "peak": {side: found.peak for side, found in sides.items()},
        "runs": {side: [asdict(run) for run in found.runs] for side, found in sides.items()},
    }


def require_equal_losses(results: Sequence[dict[str, Any]]) -> None:
    """Raises SystemExit where a side's losses are not within tolerance: then its seconds do not compare."""
    wrong = [
        f"{side} on prompt {r['prompt']}: losses differ by {difference:.1e}"
        for r in results for side, difference in r["loss_difference"].items() if not difference < LOSS_TOLERANCE
    ]
    if wrong:
        raise SystemExit(
            f"losses are not within {LOSS_TOLERANCE:g} of pi-ray's, so seconds do not compare: " + "; ".join(wrong)
        )


def figures(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    over = {f"over_{side}_{r['prompt']}": r["over"][side] for r in results for side in ("hf", "trl")}
    peaks = {
        side: max(r["peak"][side] for r in results)
        for side in results[0]["peak"]
        if all(side in r["peak"] for r in results)
    }
    leanest = min(peak for side, peak in peaks.items() if side.startswith("trl"))
    order = ("over_hf_template", "over_trl_template", "over_hf_query", "over_trl_query")
    return {**{key: over[key] for key in order}, "peak_memory_over_trl": peaks["pi-ray"] / leanest}


def conversation_figures(result: dict[str, Any]) -> dict[str, float]:
    fed = {side: sum(runs[0]["fed"]) for side, runs in result["runs"].items()}
    ratio = fed["hf"] / fed["pi-ray"]
    return {"over_hf": result["over"]["hf"], "token_ratio": ratio, "of_token_ratio": result["over"]["hf"] / ratio}


def environment(threads: int) -> dict[str, str]:
    """The environment of every side: its threads, one GPU at most, no deprecation warnings of the trainers."""
    one_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    quiet = {
        "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
        **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),
    }
    return {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": one_gpu, **quiet}


def available_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return (
        int(
            next(
                line.split()[1]
                for line in Path("/proc/meminfo").read_text().splitlines()
                if line.startswith("MemAvailable")
            )
        )
        * 1024
    )


def cores() -> int:
    return len(os.sched_getaffinity(0))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", choices=["queries", "conversations"], default="queries")
    parser.add_argument("--data", default="", help="NL2Bash folder; default: nl2bash in $PI_RAY_DATA")
    parser.add_argument("--updates", type=int, default=4, help="of each side in each round; the first one warms up")
    parser.add_argument(
        "--rounds", type=int, default=1,
        help=f"with the template; {QUERY_ROUNDS} times as many without, which are short",
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--micro", type=int, default=0,
        help="rows of one forward pass of the unpacked peers; 0: the batch, or the half that memory holds, and so on",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, help="also write every measurement there, as JSON")
    args = parser.parse_args()
    if args.updates < 2:
        parser.error("--updates must be at least 2: the first one only warms up")
    if args.micro and args.batch % args.micro:
        parser.error("--micro must divide --batch")
    if args.rows == "queries" and not find_spec("trl"):
        raise SystemExit("the peer TRL is not installed: pip install trl")
    return args


def main() -> None:
    args = _arguments()
    os.environ.update(environment(args.threads))
    if args.rows == "conversations":
        return compare_conversations(args, conversations_folder(args.data))
    data = data_folder(args.data)
    header(
        f"training of {args.model}, LoRA, {args.dtype}, {args.threads} thread(s), against Hugging Face Trainer and TRL"
    )
    print("  " + ", ".join(f"{p} {version(p)}" for p in ("trl", "accelerate", "datasets")))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, rate in PROMPTS.items():
            config = run_config(Path(folder) / name, args.model, args.dtype, args.batch, args.updates, [rate])
            longest = in_fresh_process(prepare, config, data)
            micro = args.micro or in_fresh_process(_fitting, config, longest)
            rounds = args.rounds if rate else args.rounds * QUERY_ROUNDS
            results.append(compare(config, name, rounds, args.threads, micro))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    require_equal_losses(results)
    last_line(**figures(results))


def compare_conversations(args: argparse.Namespace, data: str) -> None:
    """pi-ray and Trainer on conversations behind the whole template, one forward pass of Trainer a row."""
    header(f"training of {args.model} on conversations, LoRA, {args.dtype}, {args.threads} thread(s), against Trainer")
    with tempfile.TemporaryDirectory() as folder:
        options = {"task": "conversations", "gradient_checkpointing": True}
        config = run_config(Path(folder), args.model, args.dtype, args.batch, args.updates, [1.0], **options)
        in_fresh_process(prepare, config, data)
        result = compare(config, "conversations", args.rounds, args.threads, args.micro or 1, ("hf",))
    if args.out:
        args.out.write_text(json.dumps([result], indent=1) + "\n")
    require_equal_losses([result])
    last_line(**conversation_figures(result))


def _fitting(config: RunConfig, row_tokens: int) -> int:
    from transformers import AutoConfig

    return micro_batch(
        config.train.batch_size, row_tokens, AutoConfig.from_pretrained(resolve_base(config.model.base)),
        available_memory(),
    )


if __name__ == "__main__":
    main()
