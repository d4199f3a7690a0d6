"""Answering: a teacher that is not trained here makes rows of queries that nobody has labelled, before preparation.

Queries and a template enter, answered/ of the run directory leaves: train, dev and test rows whose answers are those of
the base model with the whole prompt (base_teacher.py), or of a model behind an endpoint (endpoint.py).
"""
