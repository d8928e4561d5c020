"""Parts of tools/bench_layouts.py: the table's rows, their processes, launches of other benches."""
