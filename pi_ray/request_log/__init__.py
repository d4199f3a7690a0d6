"""From a request log to a task: what recurs in the log becomes template and tools, the rest rows and queries.

Enters a log of requests to OpenAI's API, leaves the files of a task (`pi-ray init FOLDER --from LOG`).
"""
