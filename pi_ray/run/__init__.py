"""One run on disk: its directory, artifacts (written whole or not at all, hashed), rows, fingerprints; object storage.

Configs enter, paths and rows leave. Everything above the config and the protocols may import it.
"""
