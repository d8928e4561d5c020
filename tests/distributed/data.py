"""Sizes of the data that every test of a layout trains on."""

VOCABULARY = 64
SEQUENCE = 16

#: Sequences of a step, over all ranks and microbatches of one sequence each.
BATCH = 4
