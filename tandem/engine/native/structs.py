"""What the kernels are handed: weights, a model, a cache. Mirrors src/model.h, src/linear.h and
src/transfer.h."""

from __future__ import annotations

import ctypes

import torch

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of a cache or an embedding


class Codebook(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_int8 * 16),
        ("words", ctypes.c_int16 * 16),
        ("byte_factor", ctypes.c_float),
        ("word_factor", ctypes.c_float),
    )


class Linear(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("is_rotated", ctypes.c_int32),
        ("num_outliers", ctypes.c_int32),
        ("outlier_inputs", ctypes.c_void_p),
        ("outliers", ctypes.c_void_p),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "input_norm",
                "query_norm",
                "key_norm",
                "attended_norm",
                "ffn_norm",
                "ffn_out_norm",
            )
        ),
        ("window", ctypes.c_int32),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_layers",
                "hidden",
                "heads",
                "kv_heads",
                "dim",
                "ffn",
                "vocab",
                "plain_norm",
                "qk_norm",
                "embedding_number",
            )
        ),
        ("eps", ctypes.c_float),
        ("clip_qkv", ctypes.c_float),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("head", Linear),
        ("layers", ctypes.POINTER(Layer)),
    )


class Cache(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("layers_written", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("number", ctypes.c_int32),
    )


class Blocks(ctypes.Structure):
    _fields_ = (
        ("cache", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("vector_bytes", ctypes.c_int32),
        ("first_layer", ctypes.c_int32),
        ("layers", ctypes.c_int32),
        ("exponent", ctypes.c_int32),
        ("is_half", ctypes.c_int32),
    )
