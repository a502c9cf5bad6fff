# SPDX-License-Identifier: Apache-2.0
"""The structs of the public headers, field by field."""

import ctypes

F32 = 0
BF16 = 1

ACCUMULATE = 1

RULE_NONZERO = 0
RULE_THRESHOLD = 1
RULE_TOP = 2
RULE_ENERGY = 3


class Matrix(ctypes.Structure):
    """``sebp_matrix`` of matrix.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    ]


class RuleStruct(ctypes.Structure):
    """``sebp_rule`` of rows.h."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("threshold", ctypes.c_double),
        ("count", ctypes.c_int64),
        ("delta", ctypes.c_double),
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
    ]
