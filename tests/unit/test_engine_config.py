"""What a `config.json` means, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from baton.engine.config import EngineConfig, ModelConfig, load_model_config, resolve
from baton.engine.rope import Dynamic, Linear, Llama3, LongRope, RopeConfig, Yarn
from baton.errors import ModelLoadError
from baton.kv.spec import KVDtype, WeightFormat

LLAMA: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
GPT2: Mapping[str, object] = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 100,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 512,
}
LONG = {"short_factor": [1.0] * 8, "long_factor": [4] * 8, "original_max_position_embeddings": 512}


def load(tmp_path: Path, base: Mapping[str, object], **changes: object) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps({**base, **changes}))
    return load_model_config(tmp_path)


def named(architecture: str) -> dict[str, object]:
    return {"architectures": [architecture]}


def test_absent_fields_take_the_architectures_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, LLAMA)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert config.rope == RopeConfig(theta=10_000.0, scaling=None)
    assert (config.norm_eps, config.activation) == (1e-6, "silu")
    assert not any((config.qkv_bias, config.tied_embeddings, config.qk_norm))
    assert config.dtype is KVDtype.FLOAT32
    assert config.eos_token_ids == ()


def test_gpt2_has_learned_positions_biases_and_tied_embeddings(tmp_path: Path) -> None:
    config = load(tmp_path, GPT2)
    assert config.rope is None
    assert config.position_scheme(512) == "learned"
    assert config.intermediate_size == 256
    assert config.qkv_bias
    assert config.mlp_bias
    assert config.tied_embeddings


def test_gpt2_attention_scales_follow_the_config(tmp_path: Path) -> None:
    assert load(tmp_path, GPT2).attention_scales == (0.25, 0.25)
    assert load(tmp_path, GPT2, scale_attn_weights=False).attention_scales == (1.0, 1.0)
    by_layer = load(tmp_path, GPT2, scale_attn_by_inverse_layer_idx=True)
    assert by_layer.attention_scales == (0.25, 0.125)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2}, Linear(factor=2.0)),
        ({"rope_type": "dynamic", "factor": 2}, Dynamic(factor=2.0, original_tokens=2048)),
        (
            {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 512,
            },
            Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_tokens=512),
        ),
        (
            {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512},
            Yarn(
                factor=4.0,
                original_tokens=512,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=True,
                attention_factor=None,
                mscale=None,
                mscale_all_dim=None,
            ),
        ),
        (
            {"rope_type": "longrope", **LONG},
            LongRope(
                short_factor=(1.0,) * 8,
                long_factor=(4.0,) * 8,
                original_tokens=512,
                factor=4.0,
                attention_factor=None,
            ),
        ),
    ],
)
def test_old_and_new_spellings_of_rope_scaling_mean_the_same(
    tmp_path: Path, scaling: dict[str, object], expected: object
) -> None:
    new = load(tmp_path, LLAMA, rope_parameters={"rope_theta": 5e5, **scaling})
    old_scaling = {"type" if name == "rope_type" else name: v for name, v in scaling.items()}
    old = load(tmp_path, LLAMA, rope_theta=5e5, rope_scaling=old_scaling)
    assert new.rope == RopeConfig(theta=5e5, scaling=expected)  # type: ignore[arg-type]
    assert old == new


def test_position_scheme_names_the_context_only_where_frequencies_depend_on_it(
    tmp_path: Path,
) -> None:
    plain = load(tmp_path, LLAMA)
    assert plain.position_scheme(100) == plain.position_scheme(200)
    dynamic = load(tmp_path, LLAMA, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert dynamic.position_scheme(100) != dynamic.position_scheme(200)
    assert plain.position_scheme(100) != dynamic.position_scheme(100)


def test_mistral_has_a_window_by_default_and_none_where_it_is_null(tmp_path: Path) -> None:
    mistral = {**LLAMA, **named("MistralForCausalLM"), "max_position_embeddings": 8192}
    assert load(tmp_path, mistral).windows == (4096,) * 4
    assert load(tmp_path, mistral, sliding_window=None).windows == (None,) * 4
    assert load(tmp_path, mistral, sliding_window=64).windows == (64,) * 4
    assert load(tmp_path, mistral, sliding_window=8192).windows == (None,) * 4


def test_qwen_has_a_window_only_where_it_is_switched_on(tmp_path: Path) -> None:
    qwen = {**LLAMA, **named("Qwen2ForCausalLM"), "sliding_window": 64}
    assert load(tmp_path, qwen).windows == (None,) * 4
    some = load(tmp_path, qwen, use_sliding_window=True, max_window_layers=3)
    assert some.windows == (None, None, None, 64)
    kinds = ["sliding_attention", "full_attention"] * 2
    listed = load(tmp_path, qwen, use_sliding_window=True, layer_types=kinds)
    assert listed.windows == (64, None, 64, None)


def test_eos_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, eos_token_id=7).eos_token_ids == (7,)
    assert load(tmp_path, LLAMA, eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load(tmp_path, LLAMA, eos_token_id=7).eos_token_ids == (3, 4)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load(tmp_path, LLAMA, eos_token_id=7).eos_token_ids == (7,)


def test_eos_ids_beyond_the_vocabulary_are_dropped(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, eos_token_id=[7, 100]).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("base", "changes", "reason"),
    [
        (LLAMA, {"architectures": ["MambaForCausalLM"]}, "architectures is 'MambaForCausalLM'"),
        (LLAMA, {"architectures": None}, "architectures must name one architecture"),
        (LLAMA, {"hidden_act": "snake"}, "hidden_act is 'snake'"),
        (GPT2, {"activation_function": "snake"}, "activation_function is 'snake'"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        (LLAMA, {"vocab_size": None}, "vocab_size is missing"),
        (LLAMA, {"vocab_size": "many"}, "vocab_size must be an integer"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        (LLAMA, {"num_attention_heads": 3}, "hidden_size 64 is no multiple of 3 heads"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide 4"),
        (LLAMA, {"head_dim": 15}, "head_dim must be even"),
        (LLAMA, {"rms_norm_eps": -1}, "rms_norm_eps must be positive"),
        (LLAMA, {"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        (LLAMA, {"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        (LLAMA, {"dtype": 3}, "dtype must be a string"),
        (LLAMA, {"eos_token_id": "end"}, "eos_token_id must be a token id"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling must be an object"),
        (LLAMA, {"rope_scaling": {"type": "mrope"}}, "rope_scaling.type is 'mrope'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "longrope", **LONG, "long_factor": [1.0]}},
            "rope_parameters.long_factor must be a list of 8 numbers",
        ),
        (
            LLAMA,
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "rope_scaling.high_freq_factor must be above low_freq_factor",
        ),
        (
            {**LLAMA, **named("Qwen3ForCausalLM")},
            {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
            "layer_types must name",
        ),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention is not supported"),
        (GPT2, {"n_head": 5}, "n_embd 64 is no multiple of 5 heads"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_with_file_and_field(
    tmp_path: Path, base: Mapping[str, object], changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load(tmp_path, base, **changes)
    assert caught.value.path == str(tmp_path / "config.json")
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must hold a JSON object"),
    ],
    ids=["cut short", "too deep", "a list"],
)
def test_a_config_that_is_no_json_object_is_refused(
    tmp_path: Path, content: str, reason: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=reason):
        load_model_config(tmp_path)


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json: file is missing"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("device", "asked", "resolved"),
    [("cpu", None, "float32"), ("cpu", "float16", "float16"), ("cuda", None, "float16")],
)
def test_a_float16_checkpoint_computes_in_float32_on_cpu_unless_told_otherwise(
    tmp_path: Path, device: str, asked: str | None, resolved: str
) -> None:
    model = load(tmp_path, LLAMA, dtype="float16")
    config = EngineConfig(model="here", device=device, dtype=asked)
    assert resolve(config, model).dtype == resolved


def test_resolving_fills_in_dtype_and_context_and_changes_nothing_else(tmp_path: Path) -> None:
    model = load(tmp_path, LLAMA, dtype="bfloat16")
    given = EngineConfig(model="here", max_batch_tokens=64)
    resolved = resolve(given, model)
    expected = EngineConfig(
        model="here",
        max_batch_tokens=64,
        dtype="bfloat16",
        weights=WeightFormat.BFLOAT16,
        prompt_weights=WeightFormat.BFLOAT16,
        max_context_tokens=2048,
    )
    assert resolved == expected
    assert resolve(resolved, model) == resolved


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 2048),
        ({"type": "linear", "factor": 2.0}, 4096),
        ({"type": "dynamic", "factor": 2.0}, 4096),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"type": "longrope", **LONG}, 2048),
    ],
)
def test_a_context_beyond_what_positions_allow_is_refused(
    tmp_path: Path, scaling: dict[str, object] | None, longest: int
) -> None:
    model = load(tmp_path, LLAMA, rope_scaling=scaling)
    longest_config = EngineConfig(model="here", max_context_tokens=longest)
    assert resolve(longest_config, model).max_context_tokens == longest
    with pytest.raises(ModelLoadError, match=f"beyond the model's {longest} positions"):
        resolve(EngineConfig(model="here", max_context_tokens=longest + 1), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size_tokens": 0},
        {"max_batch_tokens": 0},
        {"max_running": -1},
        {"kv_pool_tokens": 0},
        {"threads": 0},
        {"device": "abacus"},
        {"dtype": "int8"},
    ],
)
def test_an_impossible_engine_config_is_refused_by_field(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    model = load(tmp_path, LLAMA)
    with pytest.raises(ModelLoadError, match=next(iter(changes))):
        resolve(EngineConfig(model="here", **changes), model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "own", "prompts"),
    [
        ({}, "float32", "float32"),
        ({"weights": WeightFormat.INT8}, "int8", "int8"),
        ({"weights": WeightFormat.INT8, "imports_prompts": True}, "int8", "float32"),
        (
            {"imports_prompts": True, "prompt_weights": WeightFormat.BFLOAT16},
            "float32",
            "bfloat16",
        ),
    ],
)
def test_weight_formats_default_to_the_dtype_and_prompts_to_whoever_computes_them(
    tmp_path: Path, changes: dict[str, object], own: str, prompts: str
) -> None:
    model = load(tmp_path, LLAMA, dtype="float32")
    resolved = resolve(EngineConfig(model="here", **changes), model)  # type: ignore[arg-type]
    assert resolved.weights is WeightFormat(own)
    assert resolved.prompt_weights is WeightFormat(prompts)
