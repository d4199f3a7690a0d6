"""What a run will take before it starts: memory and time from the model's shape (estimate), the whole run (plan), more nodes and rows (scale)."""
