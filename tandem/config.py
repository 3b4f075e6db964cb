"""One tree of frozen settings, checked when built. Values found out at run time live elsewhere.

ClusterConfig
├── model     ModelConfig      which checkpoint, in which precision, where it computes
├── cache     CacheConfig      block size and memory budgets
├── prefill   PrefillConfig    batching of prompts
├── decode    DecodeConfig     batching of outputs
├── cores     CoresConfig      how the workers of one machine share its cores
    ├── speculation SpeculationConfig  what drafts, and how far ahead
├── kvstore   KvStoreConfig    leases and limits of the store
├── router    RouterConfig     queue, deadlines, heartbeats
├── profile   ProfileConfig    where workers write what their steps spend time on
├── security  SecurityConfig   tokens and TLS of the public listeners
├── internal  InternalConfig   tokens and TLS between the processes of the service
└── batches   BatchConfig      files of requests that clients leave here
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.config_door import POLICIES as POLICIES
from tandem.config_door import BatchConfig as BatchConfig
from tandem.config_door import InternalConfig as InternalConfig
from tandem.config_door import RouterConfig as RouterConfig
from tandem.config_door import SecurityConfig as SecurityConfig
from tandem.config_index import IndexConfig as IndexConfig
from tandem.config_model import BUNDLED_MODELS as BUNDLED_MODELS
from tandem.config_model import IMPLEMENTATIONS as IMPLEMENTATIONS
from tandem.config_model import ModelConfig as ModelConfig
from tandem.config_profile import ProfileConfig as ProfileConfig
from tandem.config_values import build, check, check_positive
from tandem.geometry import DTYPE_BYTES, KV_CODECS
from tandem.kv_dtypes import KvDtypes
from tandem.quantizations import AUTO, CODED, FOUR_BITS, natural_kv_dtype, parse_quantization

MIB = 1 << 20
DRAFTS = ("none", "ngram", "model", "self", "qspec")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Memory for KV, in bytes, one budget per pool."""

    block_size: int = 16  # tokens
    prefill_bytes: int = 256 * MIB
    decode_bytes: int = 512 * MIB
    prefill_dtype: str = "auto"  # of KV in prefill workers: float32, bfloat16, float16; auto: as it computes
    decode_dtype: str = "auto"  # of KV in decode workers; where it is another one, KV is rounded on its way
    store_bytes: int = 512 * MIB  # of prompts on their way from prefill to decode
    prefix_bytes: int = 0  # of the store, for prompts' beginnings to be used again; 0: none is kept
    keep_blocks: bool = False  # decode workers keep those of ended requests, and fetch only what they lack

    def __post_init__(self) -> None:
        check_positive(self, "block_size", "prefill_bytes", "decode_bytes", "store_bytes")
        check(self.prefix_bytes >= 0, "cache prefix_bytes must be 0 (no cached prefixes) or more")
        check(64 % self.block_size == 0, f"block size must divide 64, not {self.block_size}")
        for name in ("prefill_dtype", "decode_dtype"):
            dtype, known = getattr(self, name), ("auto", *DTYPE_BYTES)
            check(dtype in known, f"cache {name} must be one of {', '.join(known)}, not {dtype}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """How prompts are grouped."""

    token_budget: int = 1024  # most prompt tokens in one forward; what is longer, or takes long, is chunked
    bucket_tolerance: float = 0.25  # lengths in a batch differ by at most this share of the longest
    max_batch: int = 32  # prompts in one forward
    max_wait_s: float = 0.004  # a lone prompt waits this long for company at most
    threads: int = 0  # that compute; 0: a share of the machine's cores (cores.claims), or one

    def __post_init__(self) -> None:
        check_positive(self, "token_budget", "max_batch")
        check(self.threads >= 0, "prefill threads must be 0 (a share of the cores) or more")
        check(0 <= self.bucket_tolerance <= 1, "prefill bucket_tolerance must be in [0, 1]")
        check(self.max_wait_s >= 0, "prefill max_wait_s must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """How running requests are batched."""

    max_batch: int = 64  # sequences in one step
    prefill_tokens: int = 128  # of prompts that come without KV, computed between two steps
    stall_s: float = 0.0  # running sequences wait for more than 64 of them; 0: a third of router.itl_limit_s
    threads: int = 0  # that compute; 0: a share of the machine's cores (cores.claims), or one

    def __post_init__(self) -> None:
        check_positive(self, "max_batch", "prefill_tokens")
        check(self.stall_s >= 0, "decode stall_s must be 0 (by router.itl_limit_s) or more")
        check(self.threads >= 0, "decode threads must be 0 (a share of the cores) or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoresConfig:
    """How workers without threads of their own share the cores of one machine."""

    claims: Path | None = None  # the file by which they do; the embedded service makes one, elsewhere none is


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """What drafts for the decode worker, and how far ahead. Without a draft nothing is speculated."""

    draft: str = "none"  # none | ngram | model | self | qspec
    draft_path: Path | None = None  # the draft model's checkpoint
    draft_quantization: str = "auto"  # of a draft model's or a self-draft's linear weights; auto: the fastest
    draft_activation_bits: int = 0  # of self and qspec drafts: 4, 8 or 16; 0: the faster of 8 and 16
    draft_prefill: str = "decode_worker"  # or prefill_worker: who reads prompts for a draft model
    num_assistant_tokens: int = 0  # draft tokens per step where a request does not say; 0: what pays now
    num_assistant_tokens_schedule: str = "constant"  # constant | heuristic: how that number changes
    max_assistant_tokens: int = 8  # most a request may ask for
    assistant_confidence_threshold: float = 0.0  # stop drafting below this probability
    required: bool = True  # False: go on without a draft that cannot be used, and say so

    def __post_init__(self) -> None:
        check(self.draft in DRAFTS, f"unknown draft {self.draft}; known: {', '.join(DRAFTS)}")
        self._check_quantization()
        check(
            (self.draft == "model") == (self.draft_path is not None),
            "a draft model needs a checkpoint, and only a draft model has one",
        )
        check(
            self.draft_activation_bits in (0, 4, 8, 16),
            f"draft_activation_bits must be 0, 4, 8 or 16, not {self.draft_activation_bits}",
        )
        check(
            not self.draft_activation_bits or self.draft in ("self", "qspec"),
            f"draft_activation_bits is for a self-draft or qspec, not for draft {self.draft}",
        )
        check(
            self.draft_prefill in ("decode_worker", "prefill_worker"),
            f"draft_prefill must be decode_worker or prefill_worker, not {self.draft_prefill}",
        )
        check(
            self.draft_prefill == "decode_worker" or self.draft == "model",
            f"draft_prefill prefill_worker is for a draft model, not for draft {self.draft}",
        )
        check_positive(self, "max_assistant_tokens")
        check(
            self.num_assistant_tokens_schedule in ("constant", "heuristic"),
            "num_assistant_tokens_schedule must be constant or heuristic",
        )
        check(self.num_assistant_tokens >= 0, "num_assistant_tokens must be 0 (what pays now) or more")
        check(self.max_assistant_tokens <= 15, "at most 15 assistant tokens are checked in one step")
        check(0 <= self.assistant_confidence_threshold <= 1, "assistant_confidence_threshold must be 0 to 1")

    def _check_quantization(self) -> None:
        name = self.draft_quantization
        if name != AUTO:
            parse_quantization(name)
        check(
            name in ("none", AUTO) or self.draft in ("model", "self"),
            f"draft_quantization is for a draft model or a self-draft, not for draft {self.draft}",
        )
        check(
            self.draft != "self" or name in (AUTO, *CODED),
            "a self-draft needs speculation.draft_quantization, as whole or in bf16 it costs what a target "
            "costs; its activations are set by speculation.draft_activation_bits, not behind the format",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreConfig:
    """Life times in the store. All are durations on the store's own clock."""

    url: str = field(default="auto", repr=False)  # or memory, shm, disk or redis; may hold a password
    codec: str = "raw"  # raw | fp16 | int8 | int4 | auto: how KV travels; only raw changes no token
    chunk_bytes: int = MIB
    overlap: str = "auto"  # or always: KV leaves during forwards also where that takes their cores
    overlap_bytes: int = 2 * MIB  # chunks with so much KV leave while they are computed; 0: none do
    put_deadline_s: float = 10.0
    lease_s: float = 30.0
    prefix_s: float = 600.0  # a cached prefix that nobody used for this long goes
    prefix_tokens: int = 128  # tokens of one cached piece of a prefix
    publish: str = "prompt"  # or all: what is kept of a request as a prefix, its prompt or its output too
    sweep_s: float = 0.5
    tenant_share: float = 1.0  # of the store's bytes that one tenant's objects may hold
    writer_share: float = 1.0  # that one connection may have reserved and not written yet
    index: IndexConfig = field(default_factory=IndexConfig)  # of the prefixes that several stores hold

    def __post_init__(self) -> None:
        check_positive(self, "chunk_bytes", "prefix_tokens")
        check_positive(self, "put_deadline_s", "lease_s", "prefix_s", "sweep_s")
        check(self.overlap_bytes >= 0, "kvstore overlap_bytes must be 0 or more")
        check(self.overlap in ("auto", "always"), f"overlap must be auto or always, not {self.overlap}")
        for name, share in (("tenant_share", self.tenant_share), ("writer_share", self.writer_share)):
            check(0 < share <= 1, f"kvstore {name} must be more than 0 and at most 1, not {share}")
        codecs = (*KV_CODECS, "auto")
        check(self.codec in codecs, f"unknown codec {self.codec}; known: {', '.join(codecs)}")
        check(self.publish in ("prompt", "all"), f"publish must be prompt or all, not {self.publish}")
        check(
            self.publish == "prompt" or self.codec == "raw",
            f"kvstore publish all needs codec raw: behind {self.codec} outputs have other KV than prompts",
        )
        check(self.chunk_bytes <= 4 * MIB, "kvstore chunk_bytes must be at most 4 MiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Everything a service is started with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    cores: CoresConfig = field(default_factory=CoresConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    kvstore: KvStoreConfig = field(default_factory=KvStoreConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    internal: InternalConfig = field(default_factory=InternalConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self) -> None:
        check(
            self.kvstore.prefix_tokens % self.cache.block_size == 0,
            f"kvstore prefix_tokens must be whole blocks of {self.cache.block_size} tokens, not "
            f"{self.kvstore.prefix_tokens}",
        )
        check(
            not self.cache.keep_blocks or self.kvstore.codec == "raw",
            f"cache keep_blocks needs codec raw: behind {self.kvstore.codec} KV is not what prefill computes",
        )
        for setting, is_used in (
            ("cache keep_blocks", self.cache.keep_blocks),
            ("kvstore publish all", self.kvstore.publish == "all"),
        ):
            check(
                not is_used or self.kv_dtypes.are_one,
                f"{setting} needs one KV dtype, not {self.kv_dtypes.prefill} at prefill and "
                f"{self.kv_dtypes.decode} at decode: what decode workers hold is not what prefill computes",
            )
        check(
            self.kvstore.publish == "prompt" or self.cache.prefix_bytes > 0,
            "kvstore publish all needs room for what is published: set cache.prefix_bytes",
        )
        check(
            not self.kvstore.index.url or self.cache.prefix_bytes > 0,
            "kvstore index needs prefixes to tell of: set cache.prefix_bytes",
        )
        check(
            self.speculation.draft != "qspec" or self.model.quantization in FOUR_BITS,
            f"draft qspec shares the target's four-bit weights: set model.quantization to one of "
            f"{', '.join(FOUR_BITS)}",
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClusterConfig:
        """Build from nested plain values. Unknown keys and wrong types raise `ConfigError`."""
        return build(cls, values)

    @property
    def kv_dtypes(self) -> KvDtypes:
        """Of KV on both sides."""
        natural = natural_kv_dtype(*parse_quantization(self.model.quantization), self.model.dtype)
        return KvDtypes(self.cache.prefill_dtype, self.cache.decode_dtype).settled(natural)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> ClusterConfig:
        return cls.from_dict(json.loads(text))
