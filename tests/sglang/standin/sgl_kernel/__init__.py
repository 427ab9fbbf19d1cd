"""What stock SGLang 0.5.23 takes from its kernels on a CPU, in plain torch: Llama-like models, drafts that are chains, NGRAM.

SGLang's own package of this name is CUDA only. Names, order and keywords of the parameters are SGLang's private ones, so both
are pinned together. Refused with a sentence, never ignored: EAGLE trees (topk above 1), multi-layer EAGLE, sliding windows,
soft caps, sinks, cross attention, quantised caches. It has no `convert_weight_packed`, so SGLang takes its torch paths
elsewhere, also where the processor has AMX. It serves tests of truth; its speed says nothing about SGLang's.
"""

from sgl_kernel import attention as _attention  # registers torch.ops.sgl_kernel.*
from sgl_kernel.slots import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
)
from sgl_kernel.verification import (
    build_tree_kernel_efficient_cpu,
    fill_bonus_tokens_cpu,
    rotate_input_ids_cpu,
    verify_tree_greedy_cpu,
)

__all__ = [
    "_attention",
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]
