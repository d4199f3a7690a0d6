"""The adapter store: adapters published under a name and version, in a folder or behind a URL, verified before use.

`publish` and `refresh` add a run's adapter, `release` says which version answers, `AdapterStore` opens it for serving.
"""
