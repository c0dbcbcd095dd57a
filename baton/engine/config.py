"""What a checkpoint's `config.json` says about a model, and how an engine is to run it. Torch-free.

One decoder serves all architectures here: they differ in the fields of `ModelConfig` only. What this engine cannot compute
exactly is refused with a `ModelLoadError` that names the field.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from baton.engine.fields import Fields, read_fields
from baton.engine.rope import RopeConfig, parse_rope
from baton.errors import ModelLoadError
from baton.kv.spec import KVDtype, WeightFormat

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
KERNELS = ("native", "avx512", "torch")
"""What can compute on a CPU: `EngineConfig.kernels`."""


_BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """An autoregressive decoder, of the Llama family or GPT-2."""

    path: str
    """The `config.json`, for messages."""
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_tokens: int
    norm_eps: float
    rms_norm: bool
    """RMSNorm; LayerNorm otherwise."""
    activation: str
    gated_mlp: bool
    """down(act(gate(x)) * up(x)); down(act(up(x))) otherwise."""
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm of each query and key head, before rotation."""
    tied_embeddings: bool
    rope: RopeConfig | None
    """None: learned position embeddings."""
    windows: tuple[int | None, ...]
    """Per layer: how many tokens back a query sees, itself included; None sees all."""
    attention_scales: tuple[float, ...]
    """Per layer: the factor on query times key."""
    dtype: KVDtype
    """The checkpoint's."""
    eos_token_ids: tuple[int, ...]

    @property
    def is_gpt2(self) -> bool:
        return self.architecture == "GPT2LMHeadModel"

    @property
    def longest_context_tokens(self) -> int:
        """Beyond this many tokens, positions mean nothing to the model."""
        if self.rope is None:
            return self.max_position_tokens
        return self.rope.longest_context(self.max_position_tokens)

    def position_scheme(self, context_tokens: int) -> str:
        """For `KVSpec`: equal exactly where positions enter the keys in the same way."""
        return "learned" if self.rope is None else self.rope.describe(context_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run a model. None means: decide from the checkpoint and the machine."""

    model: str
    """A directory in Hugging Face format, or a hub id."""
    dtype: str | None = None
    """`float32`, `bfloat16` or `float16`; None is the checkpoint's, but float32 for float16 on CPU."""
    weights: WeightFormat | None = None
    """How the matrices are kept; None: in the dtype. The dtype stays that of activations and KV."""
    imports_prompts: bool = False
    """Prompts are computed in the format `prompt_weights`, which other workers have where it is not this engine's. Otherwise this engine's
    own is that of prompts.
    """
    prompt_weights: WeightFormat | None = None
    """None: the dtype's own."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    block_size_tokens: int = 16
    kv_pool_tokens: int | None = None
    """None is sized from memory."""
    max_batch_tokens: int = _BATCH_TOKENS
    """Most tokens in one step: the prefill chunk budget."""
    max_running: int = 64
    """Most sequences in one step."""
    max_context_tokens: int | None = None
    """Longest sequence; None is the model's trained context."""
    threads: int | None = None
    """CPU threads of the engine; None is torch's choice."""
    most_threads: int | None = None
    """What the native kernels use while no other engine of this machine computes; None is `threads`."""
    kernels: str | None = None
    """What computes: `torch`; `native`, compiled for some CPUs and models; or `avx512`, the same without a processor's tiles (AMX), whose
    sums in bfloat16 differ. None is native where it can be.
    """
    prefix_cache: bool = True
    capture_decode: bool = True
    """CUDA: decode steps become graphs. Off where none are computed: on a prefill worker."""
    kv_cache: bool = True
    """Off recomputes every token in each step: for the benchmark that shows what the cache buys."""


def default_batch_tokens(device: str, *, prefills: bool) -> int:
    """`max_batch_tokens` of a worker that mostly prefills, or mostly decodes: a GPU computes a long chunk at its full rate, and where
    answers are generated beside it, they wait for it.
    """
    if device == "cpu":
        return _BATCH_TOKENS
    return 8192 if prefills else 2048


def resolve(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """Fills in what the model decides, dtype and context, and refuses what it cannot serve."""
    for name, value in (
        ("block_size_tokens", config.block_size_tokens),
        ("max_batch_tokens", config.max_batch_tokens),
        ("max_running", config.max_running),
        ("kv_pool_tokens", config.kv_pool_tokens),
        ("max_context_tokens", config.max_context_tokens),
        ("threads", config.threads),
        ("most_threads", config.most_threads),
    ):
        if value is not None and value < 1:
            raise ModelLoadError(config.model, f"{name} must be at least 1, not {value}")
    if config.device not in {"cpu", "cuda"}:
        raise ModelLoadError(config.model, f"device must be cpu or cuda, not {config.device!r}")
    if config.kernels not in {None, *KERNELS}:
        raise ModelLoadError(
            config.model, f"kernels must be one of {', '.join(KERNELS)}, not {config.kernels!r}"
        )
    dtypes = [dtype.value for dtype in KVDtype]
    if config.dtype is not None and config.dtype not in dtypes:
        raise ModelLoadError(
            config.model, f"dtype must be one of {', '.join(dtypes)}, not {config.dtype!r}"
        )
    context = config.max_context_tokens or model.max_position_tokens
    if context > model.longest_context_tokens:
        raise ModelLoadError(
            model.path,
            f"max_context_tokens={context} is beyond the model's {model.longest_context_tokens} positions",
        )
    dtype = KVDtype(config.dtype) if config.dtype else model.dtype
    if config.dtype is None and config.device == "cpu" and dtype is KVDtype.FLOAT16:
        # CPUs compute in float16 slowly, and a smaller range buys nothing there.
        dtype = KVDtype.FLOAT32
    own = WeightFormat(dtype.value)
    weights = config.weights or own
    return replace(
        config,
        dtype=dtype.value,
        weights=weights,
        prompt_weights=(config.prompt_weights or own) if config.imports_prompts else weights,
        max_context_tokens=context,
    )


def load_model_config(directory: Path) -> ModelConfig:
    """Reads `config.json`, and end-of-sequence ids from `generation_config.json` where it gives them. Small models inherit ids beyond
    their vocabulary from the architecture's defaults; those can never come out and are dropped.
    """
    fields = read_fields(directory / "config.json")
    architectures = fields.values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise fields.fail("architectures", f"must name one architecture, not {architectures!r}")
    named = Fields(fields.path, {"architectures": architectures[0]})
    architecture = named.choice("architectures", ("GPT2LMHeadModel", *_LLAMA_FAMILY))
    if fields.has("quantization_config"):
        raise fields.fail("quantization_config", "is set: quantized checkpoints are not supported")
    eos = fields.token_ids("eos_token_id")
    if (directory / "generation_config.json").exists():
        generation = read_fields(directory / "generation_config.json")
        eos = generation.token_ids("eos_token_id") or eos
    vocab_size = fields.integer("vocab_size")
    eos = tuple(token for token in eos if token < vocab_size)
    if architecture == "GPT2LMHeadModel":
        return _parse_gpt2(fields, eos)
    return _parse_llama_family(fields, _LLAMA_FAMILY[architecture], eos)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What an architecture fixes, and its defaults for what a config may leave out."""

    architecture: str
    qkv_bias: bool | None = None
    """None: the field `attention_bias` says."""
    out_bias: bool | None = None
    mlp_bias: bool | None = False
    """None: the field `mlp_bias` says."""
    qk_norm: bool = False
    head_dim: int | None = None
    window: int | None = None
    """Every layer's default window."""
    window_switch: bool = False
    """`use_sliding_window` and `max_window_layers` decide which layers have a window."""


_LLAMA_FAMILY = {
    family.architecture: family
    for family in (
        _Family(architecture="LlamaForCausalLM", mlp_bias=None),
        _Family(architecture="MistralForCausalLM", qkv_bias=False, out_bias=False, window=4096),
        _Family(architecture="Qwen2ForCausalLM", qkv_bias=True, out_bias=False, window_switch=True),
        _Family(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128, window_switch=True),
    )
}


def _parse_llama_family(
    fields: Fields, family: _Family, eos_token_ids: tuple[int, ...]
) -> ModelConfig:
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.fail(
            "num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} attention heads"
        )
    if family.head_dim is None and not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.fail("hidden_size", f"{hidden_size} is no multiple of {num_heads} heads")
    head_dim = fields.integer("head_dim", family.head_dim or hidden_size // num_heads)
    num_layers = fields.integer("num_hidden_layers")
    max_position_tokens = fields.integer("max_position_embeddings")
    attention_bias = fields.boolean("attention_bias", default=False)
    mlp_bias = fields.boolean("mlp_bias", default=False)
    return ModelConfig(
        path=fields.path,
        architecture=family.architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_tokens=max_position_tokens,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rms_norm=True,
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        gated_mlp=True,
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        attention_out_bias=attention_bias if family.out_bias is None else family.out_bias,
        mlp_bias=mlp_bias if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=fields.boolean("tie_word_embeddings", default=False),
        rope=parse_rope(fields, head_dim=head_dim, max_position_tokens=max_position_tokens),
        windows=_parse_windows(fields, family, num_layers, max_position_tokens),
        attention_scales=(head_dim**-0.5,) * num_layers,
        dtype=_parse_dtype(fields),
        eos_token_ids=eos_token_ids,
    )


def _parse_windows(
    fields: Fields, family: _Family, num_layers: int, max_position_tokens: int
) -> tuple[int | None, ...]:
    if not family.window_switch:
        # An absent field means the architecture's default; null means none.
        absent = "sliding_window" not in fields.values
        given = absent and family.window is not None
        window = family.window if given else None
        if fields.has("sliding_window") and family.window is not None:
            window = fields.integer("sliding_window")
        return (_active(window, max_position_tokens),) * num_layers
    if not fields.boolean("use_sliding_window", default=False):
        return (None,) * num_layers
    window = _active(fields.integer("sliding_window", 4096), max_position_tokens)
    first = fields.integer("max_window_layers", 28, least=0)
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= set(known):
        raise fields.fail("layer_types", f"must name {' or '.join(known)} for each layer")
    return tuple(known[kind] for kind in kinds)


def _active(window: int | None, max_position_tokens: int) -> int | None:
    return None if window is None or window >= max_position_tokens else window


def _parse_gpt2(fields: Fields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    hidden_size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    if hidden_size % num_heads:
        raise fields.fail("n_embd", f"{hidden_size} is no multiple of {num_heads} heads")
    if fields.boolean("add_cross_attention", default=False):
        raise fields.fail("add_cross_attention", "is not supported")
    head_dim, num_layers = hidden_size // num_heads, fields.integer("n_layer")
    scale = head_dim**-0.5 if fields.boolean("scale_attn_weights", default=True) else 1.0
    by_layer = fields.boolean("scale_attn_by_inverse_layer_idx", default=False)
    return ModelConfig(
        path=fields.path,
        architecture="GPT2LMHeadModel",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("n_inner", 4 * hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_position_tokens=fields.integer("n_positions"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        rms_norm=False,
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tied_embeddings=fields.boolean("tie_word_embeddings", default=True),
        rope=None,
        windows=(None,) * num_layers,
        attention_scales=tuple(scale / (i + 1 if by_layer else 1) for i in range(num_layers)),
        dtype=_parse_dtype(fields),
        eos_token_ids=eos_token_ids,
    )


def _parse_dtype(fields: Fields) -> KVDtype:
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    dtypes = [dtype.value for dtype in KVDtype]
    return KVDtype(fields.choice(name, dtypes, KVDtype.FLOAT32.value))
