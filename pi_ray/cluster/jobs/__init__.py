"""Runs as jobs of a Ray cluster: the bundle that travels there, submitting and following, and the entrypoint that runs
there.
"""
