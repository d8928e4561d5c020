"""The parts of ``tools/bench_kernels.py``, in the order data goes through them.

``case`` (shapes, random inputs, the bytes each part must move), ``columns`` (one small adapter for
every implementation that is compared), ``tasks`` (what is timed), ``timing`` (how), ``accuracy``
(errors against float64 and saved bytes), ``results`` (table, JSON, plot).
"""
