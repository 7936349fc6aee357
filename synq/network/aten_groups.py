"""Groups of PyTorch's operators (ATen) by what they do to values; `aten_traits.py` reads them.

Views are known by their schema and element-wise functions by PyTorch's tag, so the groups name only the
others. An operator that is in no group is unknown, and a network that applies it to an activation is rejected by name.
"""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONSTANTS = _names(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided fill zero "
    "_new_zeros_with_same_feature_meta"
)
"""Read the shape, type and device of a tensor, and none of its values."""
EMPTY = _names("empty empty_strided empty_permuted empty_like new_empty new_empty_strided")
"""Return memory that is not written yet."""
PASSIVE = _names(
    "alias clone detach lift lift_fresh squeeze unsqueeze view _unsafe_view _reshape_alias _reshape_copy _to_copy "
    "_lazy_clone dequantize nan_to_num"  # activations are finite, which the observers check
)
"""Keep all values and their order."""
PASSIVE_IF_ALL = _names("expand slice select repeat unfold as_strided narrow split split_with_sizes unbind")
"""Keep the order of the values; passive where they keep their number, too."""
RESAMPLING_MOVES = _names(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d"
)
PADS = _names(
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d"
)
MOVES = (
    PASSIVE_IF_ALL
    | RESAMPLING_MOVES
    | PADS
    | _names(
        "cat stack _stack block_diag repeat_interleave roll flip rot90 index _unsafe_index index_select gather take "
        "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle tril triu diag_embed im2col copy "
        "max_unpool2d max_unpool3d scatter slice_scatter select_scatter diagonal_scatter as_strided_scatter index_copy "
        "index_fill index_put _index_put_impl _unsafe_index_put put masked_scatter masked_fill where unsafe_split "
        "unsafe_split_with_sizes "
        "_unsafe_masked_index"
    )
)
"""Move, repeat or leave out values of their inputs, and fill in constants. Views are moves too, by their schema."""
ACCUMULATING = _names("index_put _index_put_impl _unsafe_index_put put")
"""Moves that add values up if their argument ``accumulate`` is set."""
MAX_POOLS = _names(
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d "
    "fractional_max_pool3d mkldnn_max_pool2d mkldnn_max_pool3d"
)
ORDER_REDUCTIONS = _names("amax amin aminmax max min median nanmedian kthvalue mode")
ORDER_STATISTICS = MAX_POOLS | ORDER_REDUCTIONS | _names("sort topk cummax cummin")
"""Choose values of one tensor by their order."""
CHOICES = _names("maximum minimum fmax fmin")
"""Choose between two tensors, element by element."""
AVERAGE_POOLS = _names("avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d")
INTERPOLATIONS = _names(
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa _upsample_lanczos2d_aa"
)
LINEAR_REDUCTIONS = _names("mean sum nansum")
LINEAR = (
    AVERAGE_POOLS
    | INTERPOLATIONS
    | LINEAR_REDUCTIONS
    | _names(
        "add sub rsub neg cumsum trace col2im index_add scatter_add deg2rad rad2deg mul div lerp addcmul addcdiv "
        "ldexp xlogy special_xlog1py grid_sampler_2d grid_sampler_3d _grid_sampler_2d_cpu_fallback "
        "affine_grid_generator"
    )
)
"""Sums of their inputs with constant weights, as long as no activation meets one of `FACTORS`."""
FACTORS = {
    "div": ("other",),
    "ldexp": ("other",),
    "xlogy": ("other",),
    "special_xlog1py": ("other",),
    "lerp": ("weight",),
    "addcdiv": ("tensor2",),
    "grid_sampler_2d": ("grid",),
    "grid_sampler_3d": ("grid",),
    "_grid_sampler_2d_cpu_fallback": ("grid",),
}
"""Arguments of linear operators in which they are not linear."""
MULTIPLIED = {"mul": ("self", "other"), "addcmul": ("tensor1", "tensor2")}
"""Arguments of linear operators of which at most one may be an activation: a product of two is not linear."""
PRODUCTS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addmm": ("mat1", "mat2"),
    "addbmm": ("batch1", "batch2"),
}
"""Arguments of matrix products, both of which are activations in attention; a constant in one is a weight."""
BATCH_NORMS = _names(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_no_update "
    "_batch_norm_with_update cudnn_batch_norm miopen_batch_norm"
)
NONLINEAR = _names(
    "leaky_relu hardswish glu log_sigmoid_forward _softmax _log_softmax _safe_softmax _prelu_kernel prod var std "
    "var_mean std_mean norm linalg_vector_norm linalg__powsum logsumexp logcumsumexp _logcumsumexp cumprod "
    "native_group_norm native_layer_norm _fused_rms_norm renorm dist floor_divide _add_relu rrelu_with_noise argmax "
    "argmin any all count_nonzero bucketize searchsorted isin argsort scatter_reduce index_reduce"
)
"""Non-linear functions that PyTorch does not tag as element-wise; those that it tags are non-linear unless listed."""
ELEMENTWISE = _names("leaky_relu hardswish _prelu_kernel log_sigmoid_forward floor_divide rrelu_with_noise _add_relu")
"""Element-wise functions without PyTorch's tag; leaky_relu has none in torch 2.11."""
HOMOGENEOUS = _names("relu leaky_relu rrelu_with_noise _prelu_kernel abs neg mul div")
"""f(s x) = s f(x) for s > 0, element by element."""
