"""The adapter store: adapters published under a name and version, verified before use, behind a folder or a URL; which version answers (release, aliases)."""
