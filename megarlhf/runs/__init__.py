"""What of a run survives a stop: its cadence, its states, its logs, and what a failed step leaves."""
