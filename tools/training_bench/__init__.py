"""The training bench (tools/bench_training.py).

``columns`` says what is compared, ``models`` builds it, ``measure`` times it, ``trace`` reads the
profiler's records and ``classes`` names their kernels, ``results`` writes table, JSON and plot.
"""
