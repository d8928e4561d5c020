"""Manifold-constrained hyper-connections: mhc_pre, mhc_post, mhc_post_pre.

Needs torch and triton, nothing else. ``mhc_kernels.reference`` has the equations and the symbols.
"""

from mhc_kernels.reference import mhc_post, mhc_post_pre, mhc_pre

__all__ = ["mhc_post", "mhc_post_pre", "mhc_pre"]
