"""Runs as jobs of a Ray cluster: the bundle that travels, submitting and following, the entrypoint that runs there."""
