"""Sandbox for generated programs: walls around them (jail), their side of it (harness), the verdict outside (judge).

A Program and its tests enter `runner.Sandbox`, and a Verdict leaves; or code and expressions, and their values.
Imports nothing of pi_ray but errors.
"""
