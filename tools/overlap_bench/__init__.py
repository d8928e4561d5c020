"""Parts of tools/bench_overlap.py: model, emulated wire, slots of a steady state, timeline."""
