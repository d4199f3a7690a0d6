"""A Ray cluster: joining it (session), which of its nodes do what (placement), who is let in (auth), and a run directory kept on object storage."""
