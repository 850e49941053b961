"""What a run tells the world: logs, metrics, sinks, expert load, alarms, throughput, progress bars."""
