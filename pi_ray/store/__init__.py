"""The adapter store: adapters published under a name and version, in a folder or behind a URL, verified before use.

A run directory enters (`publish`, `refresh`), verified folders leave (`AdapterStore`) for serving.
`release` sets the version that answers.
"""
