"""The program's side of the sandbox: `python -c` of this file, inside, with the standard library alone.

Standard input is a marshal of (limits, filter, folder, sources, steps). Standard output is the line `ready`, then one
of JSON, [error, [value of each step]], whose values are nested lists of a kind and ASCII text (`encode_value`). The
program may rewrite all of this process: nothing is decided here, no expected value comes in, and judge.py takes output
as data.
"""

import marshal
import os
import resource
import struct
import sys
from typing import Any

DEPTH = 100  # of nested containers; a deeper value is not plain data
SEQUENCES: Any = (list, tuple, set, frozenset)
VIEWS: Any = (type({}.keys()), type({}.items()))


def main() -> None:
    limits, syscall_filter, folder, sources, steps = marshal.load(sys.stdin.buffer)
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.chdir(folder)
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if syscall_filter:
        install_filter(syscall_filter)
    os.write(out, b"ready\n")
    # JSON: texts have no quotes or backslashes
    answer = repr(run_steps(sources, steps)).replace("'", '"').encode("ascii")
    while answer:
        answer = answer[os.write(out, answer):]
    os._exit(0)  # without waiting for threads or exit handlers


def install_filter(code: bytes) -> None:
    """Have the kernel apply a filter of seccomp.py to this process and its children, for good."""
    import ctypes

    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "the filter of system calls was refused")


def run_steps(sources: tuple[str, ...], steps: tuple[tuple[str, str], ...]) -> list[Any]:
    """[error, values]: runs the sources as `__main__`, then the steps (kind of judge.Step, source) until one raises."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    values: list[Any] = []
    error = ""
    try:
        for source in sources:
            exec(compile(source, "<program>", "exec"), module.__dict__)
        for kind, source in steps:
            execute, mode = (exec, "exec") if kind == "exec" else (eval, "eval")
            value = execute(compile(source, "<test>", mode), module.__dict__)
            values.append(encode_value(bool(value) if kind == "truth" else value))
    # SystemExit too: a program that exits before its tests are done has not passed them
    except BaseException as raised:
        error = type(raised).__name__
    return [encode_value(error), values]


def encode_value(value: Any, depth: int = 0) -> list[Any]:
    """Plain data, which compares by value in any process. A subclass counts as its base type, whatever its `__eq__`."""
    if value is None or isinstance(value, bool):
        return ["const", str(value)]
    if isinstance(value, int):
        return ["int", int.__format__(value, "x")]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, str):
        return ["str", str.encode(value, "utf-8", "surrogatepass").hex()]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if type(value).__module__ in ("fractions", "decimal") and hasattr(value, "as_integer_ratio"):
        return ["ratio", *(int.__format__(part, "x") for part in value.as_integer_ratio())]
    if depth == DEPTH:
        return ["other", ""]
    if isinstance(value, dict):
        return ["dict", [[encode_value(part, depth + 1) for part in pair] for pair in dict.items(value)]]
    for kind in SEQUENCES:
        if isinstance(value, kind):
            return [kind.__name__, [encode_value(item, depth + 1) for item in kind.__iter__(value)]]
    if isinstance(value, VIEWS):  # they equal sets
        return ["set", [encode_value(item, depth + 1) for item in value]]
    return ["other", ""]


if __name__ == "__main__":
    main()
