"""Checkpoints: read, write, convert, upcycle, verify.

``safetensors_io`` and ``torch_dist`` are the two file formats, read and written one tensor at a
time. ``convert`` runs a plan (what is written, made of what) with bounded memory, resumable and
atomic. ``names``, ``arguments`` and ``connections`` are the tables: tensor names, settings, layouts
of the hyper-connections. The other modules make plans of them; ``tools/convert_checkpoint.py`` is
the command line.
"""
