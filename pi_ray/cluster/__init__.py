"""A Ray cluster: joining it (session), which nodes do what (placement), the token (auth), storage that nodes share.

The steps of a run import these. doctor/, render/ and jobs/ stand above the steps.
"""
