"""Runs as jobs of a Ray cluster: what travels there (bundle), sending and following it (submit), and what runs there
(entrypoint).
"""
