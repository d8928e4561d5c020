"""The parts of tools/collect.py: reading runs of any kind, comparing them, table and plot."""
