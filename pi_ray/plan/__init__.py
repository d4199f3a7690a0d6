"""Estimates before a run starts: memory and time from the model's shape (estimate), the run (plan), more (scale).

A run file enters, figures leave; nothing is loaded or trained.
"""
