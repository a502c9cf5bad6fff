# SPDX-License-Identifier: Apache-2.0
"""The structs of the public headers, field by field."""

import ctypes

F32 = 0
BF16 = 1

ACCUMULATE = 1

PRECISION_MEDIUM = 4

DEVICE_CPU = 0
DEVICE_CUDA = 1

RULE_NONZERO = 0
RULE_THRESHOLD = 1
RULE_TOP = 2
RULE_ENERGY = 3
RULE_SAMPLED = 4


class Matrix(ctypes.Structure):
    """``sebp_matrix`` of matrix.h.

    Attributes
    ----------
    memory : object
        The array or tensor that the matrix is in, kept alive by it; None: memory of the library's.
    is_copy : bool
        Whether `memory` is a copy of what the matrix was made of. What is written to it is lost.
    """

    memory: object = None
    is_copy: bool = False

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    ]


class _ThresholdOrSeed(ctypes.Union):
    _fields_ = [("threshold", ctypes.c_double), ("seed", ctypes.c_uint64)]


class _DeltaOrShare(ctypes.Union):
    _fields_ = [("delta", ctypes.c_double), ("share", ctypes.c_double)]


class RuleStruct(ctypes.Structure):
    """``sebp_rule`` of rows.h."""

    _anonymous_ = ("threshold_or_seed", "delta_or_share")
    _fields_ = [
        ("kind", ctypes.c_int),
        ("threshold_or_seed", _ThresholdOrSeed),
        ("count", ctypes.c_int64),
        ("delta_or_share", _DeltaOrShare),
    ]


class LinearOptions(ctypes.Structure):
    """``sebp_linear_options`` of linear.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("rule", RuleStruct),
        ("x_is_compact", ctypes.c_int),
        ("inactive", ctypes.c_int),
        ("dx_write", ctypes.c_int),
        ("dw_write", ctypes.c_int),
        ("db_write", ctypes.c_int),
        ("residual", ctypes.POINTER(Matrix)),
        ("activation", ctypes.c_int),
        ("activated", ctypes.POINTER(Matrix)),
        ("before", ctypes.POINTER(Matrix)),
        ("precision", ctypes.c_int),
        ("packed_weight", ctypes.c_void_p),
    ]


class NormOptions(ctypes.Structure):
    """``sebp_norm_options`` of layers.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("norm", ctypes.c_int),
        ("epsilon", ctypes.c_double),
        ("gain_offset", ctypes.c_double),
        ("dropout", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("inactive", ctypes.c_int),
        ("dh_write", ctypes.c_int),
        ("dgain_write", ctypes.c_int),
        ("dshift_write", ctypes.c_int),
    ]


class ActivationOptions(ctypes.Structure):
    """``sebp_activation_options`` of layers.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("inactive", ctypes.c_int),
    ]


class DropoutOptions(ctypes.Structure):
    """``sebp_dropout_options`` of layers.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("probability", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("inactive", ctypes.c_int),
    ]


class RotaryOptions(ctypes.Structure):
    """``sebp_rotary_options`` of layers.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("head_size", ctypes.c_int64),
        ("interleaved", ctypes.c_int),
        ("inactive", ctypes.c_int),
        ("base", ctypes.c_double),
        ("factor", ctypes.c_double),
        ("low_factor", ctypes.c_double),
        ("high_factor", ctypes.c_double),
        ("original_length", ctypes.c_double),
    ]


class CrossEntropyOptions(ctypes.Structure):
    """``sebp_cross_entropy_options`` of loss.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("ignore_label", ctypes.c_int64),
        ("smoothing", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("inactive", ctypes.c_int),
        ("dhidden_write", ctypes.c_int),
        ("dweight_write", ctypes.c_int),
        ("dbias_write", ctypes.c_int),
        ("precision", ctypes.c_int),
    ]


class EmbeddingStruct(ctypes.Structure):
    """``sebp_embedding`` of embedding.h."""

    _fields_ = [("table", Matrix), ("indices", ctypes.c_void_p)]


class EmbeddingOptions(ctypes.Structure):
    """``sebp_embedding_options`` of embedding.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("inactive", ctypes.c_int),
        ("padding_index", ctypes.c_int64),
        ("write", ctypes.c_int),
    ]


class SparseStruct(ctypes.Structure):
    """``sebp_sparse`` of sparse.h."""

    _fields_ = [
        ("indices", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
    ]


class AdamWOptions(ctypes.Structure):
    """``sebp_adamw_options`` of optim.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("learning_rate", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("epsilon", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
    ]


class StochasticOptions(ctypes.Structure):
    """``sebp_stochastic_options`` of optim.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("decay", ctypes.c_double),
    ]


class AttentionOptionsStruct(ctypes.Structure):
    """``sebp_attention_options`` of attention.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("causal", ctypes.c_int),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("dropout", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("inactive", ctypes.c_int),
    ]


class ContextOptions(ctypes.Structure):
    """``sebp_context_options`` of context.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("threads", ctypes.c_int),
        ("placement", ctypes.c_int),
        ("gemm", ctypes.c_int),
        ("workspace_bytes", ctypes.c_int64),
        ("parallel_for", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("message_bytes", ctypes.c_size_t),
        ("device", ctypes.c_int),
        ("precision", ctypes.c_int),
        ("gpu", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    ]


class Dropped(ctypes.Structure):
    """``sebp_dropped`` of rows.h."""

    _fields_ = [("rows", ctypes.c_int64), ("energy", ctypes.c_double)]


class Info(ctypes.Structure):
    """``sebp_info`` of info.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("onednn", ctypes.c_char * 32),
        ("hwloc", ctypes.c_char * 32),
        ("openmp", ctypes.c_int),
        ("cores", ctypes.c_int),
        ("logical_cpus", ctypes.c_int),
        ("numa_nodes", ctypes.c_int),
        ("core_kinds", ctypes.c_int),
        ("cpu_quota", ctypes.c_double),
        ("l2_bytes", ctypes.c_size_t),
        ("l3_bytes", ctypes.c_size_t),
        ("placement", ctypes.c_int),
        ("gemm", ctypes.c_int),
        ("placement_refused", ctypes.c_char_p),
        ("amx_refused", ctypes.c_char_p),
        ("cuda", ctypes.c_char * 32),
        ("gpu", ctypes.c_char * 64),
    ]
