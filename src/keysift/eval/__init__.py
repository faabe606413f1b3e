"""What sparse attention costs in accuracy: tasks, resumable runs, tables and pictures."""
