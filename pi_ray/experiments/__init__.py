"""Experiments: a table file enters, a sweep of runs is done, and a table in the paper's layout leaves.

sweep.py says which runs there are, run_table.py does them, table.py computes and lays out the numbers.
"""
