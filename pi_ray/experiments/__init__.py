"""Many runs that differ in a few keys: columns times seeds (sweep), and the table of a paper that they fill (table)."""
