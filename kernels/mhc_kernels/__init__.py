"""Fused kernels for manifold-constrained hyper-connections; needs torch and triton only.

The equations, symbols and shapes are in ``mhc_kernels.reference``; README.md shows the use.
"""

from .functions import mhc_enter, mhc_post, mhc_post_pre, mhc_pre, mhc_refill, supported

__all__ = ["mhc_enter", "mhc_post", "mhc_post_pre", "mhc_pre", "mhc_refill", "supported"]
