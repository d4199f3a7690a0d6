"""What a person reads: an evaluation's numbers in order (summary), their money (cost), pictures (charts) and one page (page)."""
