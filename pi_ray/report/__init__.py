"""The report: an evaluation's summary and the training log enter, report.html, loss.svg and terminal tables leave.

summary.py writes the numbers in words, cost.py turns tokens into money, charts.py draws, page.py puts it on one page.
"""
