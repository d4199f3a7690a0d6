"""`pi-ray plan`: what a run will do, take and save, before anything is trained.

It reads rows and tokenizer, loads no weights and starts no Ray. A template that is not compressed yet counts as rate x
tokens. Time and money are estimates (estimate.py, report/cost.py).
"""

from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pi_ray.answer.rows import describe_answers, is_answered, planned_splits
from pi_ray.ask.ask import queries_fingerprint
from pi_ray.ask.sources import Sources, task_sources
from pi_ray.cluster import placement
from pi_ray.config import RunConfig
from pi_ray.data.context import ConversationContext
from pi_ray.data.ingest import check_splits
from pi_ray.models import load_tokenizer
from pi_ray.plan import estimate
from pi_ray.plan.asking import plan_asking
from pi_ray.plan.figures import PhasePlan, Plan
from pi_ray.plan.inputs import PlanInputs
from pi_ray.plan.scale import print_scale
from pi_ray.plan.token_counts import count_row_tokens
from pi_ray.progress import format_money
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import SPLITS, UNLABELLED, Reject, Row, Task
from pi_ray.registry import tasks
from pi_ray.report import cost
from pi_ray.run.answered import answered_config, answered_facts, require_queries
from pi_ray.run.artifact import is_current
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.run.phases import first_taught_phase, max_shots, plain_finetuning_config
from pi_ray.schedule import Phase, plan_phases
from pi_ray.train.anchor import AnchorRows
from pi_ray.train.drills import describe_drills
from pi_ray.train.facts import find_facts
from pi_ray.train.floor import FEW_ROWS
from pi_ray.train.phase_scores import scored_rows
from pi_ray.train.replicas import check_replica, gpu_gib, replica_bytes, replica_gpus
from pi_ray.train.teaching import describe_options
from pi_ray.train.updates import updates_in_phase

# Tokens of training that one new token costs to generate, about: one at a time, a model mostly waits for memory.
TOKENS_PER_NEW_TOKEN = 5
LABEL_TOKENS = 32  # of an answer that no teacher has written yet


def plan_run(config: RunConfig, inputs: PlanInputs | None = None) -> Plan:
    """Count rows and tokens, and estimate time, memory and money. Plans of several runs may share their `inputs`.

    Raises DataError for rows that preparation would refuse, ConfigError for a base model that no node holds, and what
    the task and the model raise.
    """
    check_replica(config)
    inputs = inputs or PlanInputs()
    task: Task = tasks[config.task.name](config.task)
    require_queries(config)
    sources = task_sources(config) if config.task.generate else None
    stand_ins = _stand_ins(config, sources) if sources and config.answers_first else []
    unanswered = config.answers_first and (bool(stand_ins) or not is_answered(config, task))
    if unanswered:
        splits, rejects = planned_splits(config, task, stand_ins), list[Reject]()
        notes = [f"as many as the teacher answers, in about {LABEL_TOKENS} tokens each"]
    else:
        config = answered_config(config)
        task = tasks[config.task.name](config.task)
        logged = wants_unlabelled(config) and (config.task.queries or not config.task.generate)
        context = _conversation_context(task, config)
        splits, rejects = inputs.splits(task, (*SPLITS, UNLABELLED) if logged else SPLITS, context)
        notes = check_splits(splits, rejects, config.task, RunDir(config.root)) + (context.notes() if context else [])
    rows = {split: len(found) for split, found in splits.items()}
    counts = count_row_tokens(task, splits["train"], config, config.learns_all_turns("train"))
    schedule = plan_phases(config.schedule)
    if unanswered:
        counts = replace(counts, label=LABEL_TOKENS)
    shapes = [counts.shape(p.rate, p.shots) for p in schedule]
    size, speed = inputs.model_size(config.model, config.train.lora), estimate.measure_speed(config)

    asking = None
    if config.task.generate and sources:
        asking = plan_asking(config, sources, size, speed, TOKENS_PER_NEW_TOKEN)
        if not unanswered:  # else they are counted as rows
            rows[UNLABELLED] = rows.get(UNLABELLED, 0) + asking.queries

    def planned(phase: Phase, anchor: float = 0.0) -> PhasePlan:
        shape = counts.shape(phase.rate, phase.shots)
        updates = updates_in_phase(rows["train"], phase, config.train.batch_size)
        fed = _with_anchor(shape, anchor, config) if anchor else shape
        seconds = updates * estimate.update_seconds(size, fed, config, speed)
        measured = phase.rate in (0, 1) or phase.rate in counts.achieved
        return PhasePlan(phase, rows["train"], shape, updates, seconds, measured)

    distill, teaches, taught = config.train.distill, wants_unlabelled(config), first_taught_phase(config)
    phases = [planned(p, distill.anchor if teaches and i >= taught else 0.0) for i, p in enumerate(schedule)]
    plain = plan_phases(plain_finetuning_config(config).schedule) if config.evaluate.baseline else []
    # a training conversation is many requests, and a test row is one of them
    asked_counts = count_row_tokens(task, splits["test"], config) if config.prompt.conversation else counts
    full = asked_counts.shape(1.0, config.evaluate.shots or max_shots(config))
    query = asked_counts.shape(schedule[-1].rate, schedule[-1].shots)
    query = replace(query, prefix=config.train.gist) if config.train.gist else query
    asked_first = sum(rows.values()) if unanswered and config.train.distill.teacher == "base" else 0

    def answering_seconds(shape: estimate.Shape, count: int) -> float:
        generated = replace(shape, prefix=0, row=shape.row + TOKENS_PER_NEW_TOKEN * shape.label)
        return count / config.train.batch_size * estimate.update_seconds(size, generated, config, speed)

    teaching = answering_seconds(shapes[0], rows.get(UNLABELLED, 0) or asked_first)
    if teaches and distill.on_policy:  # the student answers, and the teacher reads that in a forward pass
        others = rows.get(UNLABELLED, 0) / (rows["train"] + rows.get(UNLABELLED, 0))
        others = min(others, 1 - (distill.labelled or 0) - distill.anchor)
        written = round(distill.on_policy * phases[-1].updates) * others  # in updates' worth of rows
        reading = written * estimate.update_seconds(size, full, config, speed) / 2
        teaching += reading + answering_seconds(shapes[-1], round(written * config.train.batch_size))
    scored = len(scored_rows(splits["dev"])) if config.schedule.floor or config.training_metric else 0
    answering = sum(answering_seconds(shape, scored) for shape in shapes)
    answers, words = ((r.query, r.answer) for r in splits["train"]), config.train.drills
    drills = describe_drills(config, find_facts(task.template().text, answers, words.words, words.ignore))
    seconds = sum(p.seconds for p in phases) + teaching + answering + (asking.seconds if asking else 0.0)
    training = cost.training_cost(config.cost, seconds, config.train.workers)
    asked = {"base_full_prompt": full, "promptintern": query}
    prices = {n: cost.request_prices(config.cost, s.prefix + s.row, s.label, s.prefix) for n, s in asked.items()}
    return Plan(
        config=config, rows=rows, rejects=len(rejects), notes=notes, size=size, speed=speed, phases=phases,
        plain=[planned(p) for p in plain],
        memory=max((estimate.device_memory(size, s, config) for s in shapes), key=lambda m: sum(m.values())),
        host=estimate.host_memory(size, config),
        replica=replica_bytes(config) if speed.device == "gpu" else {}, full=full, query=query,
        money=cost.economics(training, prices), teaching=teaching, answering=answering, scored=scored,
        asking=asking, drills=drills,
    )


def _stand_ins(config: RunConfig, sources: Sources) -> list[Row]:
    """Rows as many as ask.queries, about as long as a unit, for queries that are not generated yet; [] where they are.
    """
    if is_current(RunDir(config.root).queries, queries_fingerprint(config, sources)):
        return []
    units = sources.units()
    return [Row(f"ask-{i}", f"{units[i % len(units)].text} {i}", "") for i in range(config.ask.queries)]


def _conversation_context(task: Task, config: RunConfig) -> ConversationContext | None:
    if not config.prompt.conversation:
        return None
    return ConversationContext(config, PromptEncoder(load_tokenizer(config.model), config.prompt), task.template())


def _with_anchor(shape: estimate.Shape, share: float, config: RunConfig) -> estimate.Shape:
    """A phase's mean row where some of the rows are the anchor's."""
    anchor = AnchorRows(config)
    row, label = (float(lengths.mean()) for lengths in (anchor.prompt_lengths, anchor.label_lengths))
    return replace(shape, row=(1 - share) * shape.row + share * row, label=(1 - share) * shape.label + share * label)


def print_plan(plan: Plan, console: Console, scale: bool = False) -> None:
    """Print the plan; with `scale` also what more nodes and rows would make of it."""
    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style))  # a user's text is never read as markup

    config, size, train = plan.config, plan.size, plan.config.train
    lora = f"{size.lora / 1e6:,.1f}M of LoRA (rank {train.lora.rank})"
    say(f"{config.name}: {config.model.base}, {size.weights / 1e6:,.0f}M weights, {lora}", "bold")
    rows = ", ".join(f"{n:,} {split}" for split, n in plan.rows.items()) + " rows"
    say("; ".join([rows, *([f"{plan.rejects:,} rejected"] if plan.rejects else []), *plan.notes]))
    console.print(_phases_table(plan))
    if any(not p.measured for p in plan.phases):
        say("~ template counted as rate x tokens; measured once it is compressed", "dim")
    if config.prompt.conversation:
        say(_conversations(plan))
    where = f"{plan.speed.name} ({plan.speed.note}; give or take a factor of two, when nothing else runs there)"
    plain = _duration(sum(p.seconds for p in plan.plain))
    baseline = f", and {plain} for plain fine-tuning as baseline," if plan.plain else ""
    say(f"Training: about {_duration(plan.seconds)}{baseline} on {where}")
    if plan.asking:
        took = f"; about {_duration(plan.asking.seconds)} of that" if plan.asking.seconds else ""
        say(f"Asking: {plan.asking.text}{took}")
    if config.answers_first:
        say(_first_teacher(plan))
    elif facts := answered_facts(config):
        say(f"Teacher: {describe_answers(facts)}")
    elif wants_unlabelled(config):
        say(_teacher(plan))
        say(f"Reading drills: {plan.drills}")
    if plan.scored:
        say(_dev_answers(plan))
    parts = f"about {_parts(plan.memory)}, besides Python and its libraries"
    say(f"Memory per worker{', on its GPU' if plan.host else ''}: {parts}")
    if plan.host:
        say(f"Host memory per worker: at most about {_parts(plan.host)}")
    if plan.replica:
        say(_replica(plan))
    cores = "a share of the CPU cores, so that more workers on one machine are not faster"
    each = "one GPU" if plan.speed.device == "gpu" else cores
    batch = f"a batch of {train.batch_size} rows gives {config.rows_per_worker} to each"
    say(f"Workers: {train.workers} training processes, each with {each}; {batch}.")
    if train.share_prefix and (reason := size.plain_batch_reason):
        say(f"Rows share the template by its cache, computed once a batch: {reason}")
    if plan.speed.device == "gpu" or scale:
        say(f"Placement: {placement.describe_placement(config)}")
    full, query = plan.full.prefix + plan.full.row, plan.query.prefix + plan.query.row
    say(f"Inference: {query:,.0f} input tokens instead of {full:,.0f}, {1 - query / full:.0%} fewer", "bold")
    training = format_money(plan.money.training, config.cost.currency)
    say(f"Cost: training about {training}. If quality holds: {cost.payback_verdict(plan.money, config.cost)}")
    if scale or (plan.speed.device == "gpu" and train.workers > config.cluster.gpus_per_node):
        console.print()
        print_scale(plan, console)


def _phases_table(plan: Plan) -> Table:
    """A line for each phase, and one for plain fine-tuning, whose phases have one prompt."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("phase", "template", "shots", "rows x passes", "prefix", "row", "label", "updates", "time"):
        table.add_column(name, justify="right")
    lines = [(str(i), [p]) for i, p in enumerate(plan.phases)] + ([("plain", plan.plain)] if plan.plain else [])
    for name, phases in lines:
        p, epochs = phases[0], sum(p.phase.epochs for p in phases)
        table.add_row(
            name, f"{'' if p.measured else '~'}{p.phase.rate:.0%}", str(p.phase.shots), f"{p.rows:,} x {epochs}",
            *(f"{tokens:,.0f}" for tokens in (p.shape.prefix, p.shape.row, p.shape.label)),
            f"{sum(p.updates for p in phases):,}", _duration(sum(p.seconds for p in phases)),
            end_section=p is plan.phases[-1],
        )
    return table


def _conversations(plan: Plan) -> str:
    every = plan.config.task.learn == "all"
    learned = "every assistant turn of a conversation is learned, in one pass" if every else "the last turn is learned"
    return f"Conversations: {learned}; a dev or test row is one assistant turn behind the conversation before it"


def _teacher(plan: Plan) -> str:
    queries, cure = plan.rows.get(UNLABELLED, 0), "task.queries names the file they come from, or generates them"
    how = "".join(f"; {option}" for option in describe_options(plan.config))
    if not queries:
        return f"Teacher: no unlabelled queries, so it teaches on labelled rows alone{how}; {cure}"
    adapter = plan.config.train.distill.teacher == "adapter"
    who = "the adapter as phase 0 leaves it" if adapter else "the base model"
    where = " in actors, while training waits with its checkpoint" if plan.config.train.actors_answer else ""
    work = f"answers {queries:,} unlabelled queries with the prompt of phase 0{where}"
    return f"Teacher: {who} {work}, about {_duration(plan.teaching)} of that{how}"


def _first_teacher(plan: Plan) -> str:
    """A teacher that answers before preparation."""
    endpoint = plan.config.train.distill.teacher == "endpoint"
    who = f"{plan.config.closed.model}, which costs money and asks first," if endpoint else "the base model"
    time = f", about {_duration(plan.teaching)} of that" if plan.teaching else ""
    return f"Teacher: {who} answers the queries with the whole prompt before anything is trained{time}"


def _dev_answers(plan: Plan) -> str:
    schedule, sharded = plan.config.schedule, plan.config.train.backend.shards_weights
    time = f"about {_duration(plan.answering)} of that"
    if not schedule.floor:
        return f"Metric: after each phase {plan.scored:,} dev rows are answered, {time}; task.metric chooses by them"
    how = "judged by their tokens, since ZeRO stage 3 cannot generate," if sharded else "answered"
    few = f" ({plan.scored} rows are few, so that chance decides with them)" if plan.scored < FEW_ROWS else ""
    rows = f"after each phase {plan.scored:,} dev rows are {how} under its prompt{few}"
    keeps = f"that keeps {schedule.floor:.4g} of the first phase's score"
    shots = any(p.phase.shots for p in plan.phases)
    fixed = "; examples are then fixed ones, which a server can send" if shots else ""
    return f"Quality floor: {rows}, {time}; the run ends at the shortest prompt {keeps}{fixed}"


def _replica(plan: Plan) -> str:
    """Where a copy of the base that generates goes."""
    gpus, gib = replica_gpus(plan.config), f"{gpu_gib(plan.config):.0f}"
    where = f"on one GPU of {gib} GiB" if gpus == 1 else f"over {gpus} GPUs of {gib} GiB of one node"
    how = "" if gpus == 1 else " (by tensor parallelism with vLLM, else by layers)"
    return f"Each copy that evaluates, teaches or serves: about {_parts(plan.replica)}, {where}{how}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _parts(memory: dict[str, float]) -> str:
    return f"{_bytes(sum(memory.values()))} ({', '.join(f'{name} {_bytes(count)}' for name, count in memory.items())})"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:,.0f} MiB"
