"""Asking: queries about every unit of a prompt, written by a model, for a teacher to answer (`task.queries: generate`).

    sources = task_sources(config)                  # or Sources(template, labelled, held_out, log) of your own
    manifest = ask_queries(config, sources, confirm, progress)
    read_queries(RunDir(config.root))               # [Asked(id, query, kind, units)], of pi_ray/run/queries.py

The result is the artifact <run_dir>/queries; it is made once, and a stopped one goes on. With no labelled rows the
writer is `prompt` or `endpoint`. Imports go down to train/, data/, hosted/ and run/.
"""
