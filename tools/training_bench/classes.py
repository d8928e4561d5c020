"""Which part of a step a kernel belongs to, by its name: a table, the first match counts."""

from __future__ import annotations

import functools
import re

#: Class -> regular expression over the kernel's name. Order matters: cuDNN's attention kernels
#: name the ``wgmma`` they use, quantised GEMMs name ``fp8``, routers sort.
CLASSES: dict[str, str] = {
    # kernels/mhc_kernels, then Transformer Engine's Triton kernels of common/triton/mhc.py.
    "mHC refill": r"^refill\w*kernel|recompute_block",
    "mHC backward": (
        r"^(boundary_grad|logits_grad|phi_grad|norm_weight_grad|\w+_grad(_\w+)?_kernel)"
        r"|^_mhc_\w*bwd"
    ),
    "mHC forward": r"^(post_project|post_kernel|post_pre|read_kernel|split_phi)|^_mhc_",
    "communication": r"nccl|nvshmem|deepep|deep_ep|^ncclDev|all_?reduce|reduce_?scatter",
    "attention": (
        r"sdpa|fmha|flash_?(fwd|bwd|attn|fprop|bprop)|attention|masked_softmax|softmax_warp"
        r"|rope|rotary"
    ),
    "MoE permute": (
        r"permut|unpermut|row_id_map|sort_chunks|chunk_sort|moe_|topk|top_k|TopK|fused_topk"
        r"|aux_loss|router|fused_score|RadixSort|radixSort|bitonicSort|histogram|multi_padding"
        r"|multi_unpadding|scatter_gather_elementwise|_scatter_gather"
    ),
    "quantise": r"quantize|cast_transpose|cast_kernel|fp8_|amax|block_scal|multi_cast|transpose",
    "GEMM": (
        r"gemm|nvjet|cutlass|xmma|wgmma|cublas|splitK|split_k|gemv|sm\d\d_.*(_nt_|_nn_|_tn_)"
    ),
    "norm": r"rms_?norm|layer_?norm|ln_fwd|ln_bwd|norm_(fwd|bwd)|normalization",
    "optimizer": r"multi_tensor|adam|l2norm",
    "cross entropy": r"cross_entropy|log_softmax|nll_loss|vocab_parallel",
    "memory": r"^Mem(cpy|set)|FillFunctor|copy_kernel|direct_copy|CatArrayBatchedCopy",
}
OTHER = "other"
#: All classes in the order in which they are shown.
NAMES = (
    "GEMM",
    "attention",
    "MoE permute",
    "quantise",
    "norm",
    "cross entropy",
    "optimizer",
    "communication",
    "mHC forward",
    "mHC backward",
    "mHC refill",
    "memory",
    OTHER,
)
_COMPILED = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in CLASSES.items()}


@functools.cache
def class_of(kernel: str) -> str:
    """The class of a kernel's name; ``other`` where nothing in the table matches."""
    return next((name for name, found in _COMPILED.items() if found.search(kernel)), OTHER)
