"""A Ray cluster: joining it (session), which nodes do what (placement), the token (auth), and storage that nodes share.

The steps of a run import these. doctor/, render/ and jobs/ stand above the steps: they check a run, write a cluster's
files, and send runs to a cluster.
"""
