"""What a run tells about itself: defined metrics, phase clock, writers, progress bars and the report."""
