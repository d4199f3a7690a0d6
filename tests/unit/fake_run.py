"""A run directory as evaluation leaves it, made up: for the tests of cost and report."""

import copy
import json
import math

from pi_ray.config import RunConfig
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir

HOSTILE = (
    '</pre><script>console.error("pwned")</script><img src=x onerror=\'console.error("pwned")\'>'
    '&lt; "\u202e\x00\ud800 {{ 7*7 }}'
)


def column(label, exact, bleu, tokens, prefix, latency, cached, groups, width=0.06):
    def scores(value, bleu_value, spread):
        return {
            "exact_match": value,
            "bleu": bleu_value,
            "execution": min(1.0, value + 0.03),
            "intervals": {
                "exact_match": [max(0.0, value - spread), min(1.0, value + spread)],
                "bleu": [bleu_value - 3, bleu_value + 3],
                "execution": [max(0.0, value + 0.03 - spread), min(1.0, value + 0.03 + spread)],
            },
        }

    return {
        "label": label, **scores(exact, bleu, width), "input_tokens": tokens, "output_tokens": 18.4, "cut_off": 0.0,
        "prefix_tokens": prefix, "latency_s": latency, "latency_cached_s": cached,
        "groups": {g: {"rows": 60, **scores(v, bleu, width * 1.6)} for g, v in groups.items()},
    }


SUMMARY = {
    "run": "demo",
    "task": "opsql",
    "model": "smollm2-135m",
    "seed": 0,
    "fingerprint": "0f3a" * 16,
    "command": "pi-ray run run.yaml",
    "train_rows": 480,
    "test_rows": 120,
    "max_new_tokens": 40,
    "groups": {"services in the rows": 60, "services only in the template": 60},
    "versions": {"torch": "2.13.0", "ray": "2.60.0", "transformers": "5.24.0"},
    "hardware": "2 CPU cores",
    "train": {
        "promptintern": {"updates": 90, "seconds": 2710.0, "tokens": 351_220, "workers": 2},
        "plain": {"updates": 90, "seconds": 1140.0, "tokens": 108_300, "workers": 2},
    },
    "base": column(
        "Base, query alone", 0.0, 1.9, 31.2, 4, 0.91, 0.90,
        {"services in the rows": 0.0, "services only in the template": 0.0}, 0.0,
    ),
    "base_full_prompt": column(
        "Base, full prompt", 0.06, 14.2, 640.4, 598, 3.42, 1.13,
        {"services in the rows": 0.07, "services only in the template": 0.05},
    ),
    "plain": column(
        "Plain fine-tuning", 0.5, 71.3, 31.2, 4, 0.74, 0.73,
        {"services in the rows": 0.98, "services only in the template": 0.02},
    ),
    "promptintern": column(
        "PromptIntern", 0.70, 88.0, 31.2, 4, 0.75, 0.74,
        {"services in the rows": 0.97, "services only in the template": 0.43},
    ),
}


def summary(**changes):
    """A copy of SUMMARY; dotted keys reach in, None removes: `summary(**{"promptintern.exact_match": .2, "plain":
    None})`.
    """
    made = copy.deepcopy(SUMMARY)
    for key, value in changes.items():
        *path, last = key.split(".")
        block = made
        for part in path:
            block = block[part]
        if value is None:
            del block[last]
        else:
            block[last] = value
    return made


def config(folder, **changes):
    return RunConfig(name="demo", run_dir=str(folder), task={"name": "opsql"}).replace(**changes)


def write_run(folder, made=SUMMARY, text="errors by host since 14:00"):
    """Write summary, samples, logs, manifests and templates under `folder`; `text` goes wherever outside text can
    go.
    """
    run = RunDir(folder)
    write_atomic(run.evaluation / "summary.json", json.dumps(made))
    outputs = {
        name: "count errors by host" if name in ("plain", "promptintern") else text
        for name in ("base", "base_full_prompt", "plain", "promptintern")
    }
    samples = [
        {
            "id": f"test-{i}", "group": text if i == 1 else "rows", "query": text, "answer": "count errors by host",
            "outputs": outputs,
        }
        for i in range(12)
    ]
    write_atomic(run.evaluation / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    write_atomic(run.train_log, "".join(json.dumps(e) + "\n" for e in log(0.2)) + '{"step": 90, "phase"')
    write_atomic(
        run.baseline("plain").train_log, "".join(json.dumps({**e, "phase": 0}) + "\n" for e in log(0.35) if "loss" in e)
    )
    for i, (rate, shots) in enumerate([(1.0, 2), (0.5, 1), (0.0, 0)]):
        tokens = {"prefix": 598 * rate, "row_mean": 27 + 22 * shots, "label_mean": 14}
        manifest = {
            "phase": {"rate": rate, "shots": shots}, "rows": 480, "tokens": tokens, "prefix_ids": [1], "template": "",
        }
        write_atomic(run.phase(i) / "manifest.json", json.dumps(manifest))
    templates = [
        {
            "rate": r, "asked": r, "achieved": a, "tokens": round(598 * a), "full_tokens": 598,
            "compressor": "llmlingua", "note": "", "text": text,
        }
        for r, a in ((1.0, 1.0), (0.5, 0.513))
    ]
    write_atomic(run.templates / "templates.json", json.dumps(templates))
    return run


def log(floor):
    for step in range(90):
        phase = step // 30
        loss = (
            floor
            + 2.4 * math.exp(-step / 12)
            + 0.5 * math.exp(-(step % 30) / 5) * (phase > 0)
            + 0.08 * math.sin(step * 2.1)
        )
        yield {
            "step": step, "phase": phase, "epoch": 0, "loss": loss, "lr": 5e-4, "tokens": 3900, "seconds": 30.0,
            "time": 1.7e9 + 30 * step,
        }
        if step % 30 == 29:
            yield {"event": "phase_end", "phase": phase, "step": step, "dev_loss": floor + 0.1}
