"""Tasks: data sets with their templates and metrics, under the names that `task.name` takes.

A TaskConfig enters; rows, rejects, a template and scores leave (protocols.Task). Generated code runs in sandbox/ only.
"""
