"""In and out of the ERNIE 4.5 ecosystem: one copy of pieces between any two layouts, bounded in memory, resumable."""
