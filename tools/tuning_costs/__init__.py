"""What tools/bench_tuning.py measures, and what it measures with."""
