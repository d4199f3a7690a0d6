"""Preparation: a task's rows become templates, neighbours and one tokenised dataset for each phase, on Ray Data.

A task enters, artifacts in the run directory leave; train/ and evaluate/ read them. Imports compress/, retrieve/,
cluster/ and run/.
"""
