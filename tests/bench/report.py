"""What every benchmark prints: versions, and as its last line one JSON object."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "peft", "ray", "deepspeed")


def header(title: str) -> None:
    print(title)
    print("  " + ", ".join([f"python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES)]))
    print(f"  {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} before the run", flush=True)


def last_line(**figures: float) -> None:
    print(json.dumps({name: round(value, 10) for name, value in figures.items()}))
