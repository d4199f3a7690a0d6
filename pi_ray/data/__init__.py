"""A task's rows on their way to training: ingested and checked, compressed and given examples on Ray Data, written as one dataset for each phase."""
