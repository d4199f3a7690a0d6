"""Generated programs run here and nowhere else: walls around them (jail), their side of it (harness), and the verdict outside (judge)."""
