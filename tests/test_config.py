# SPDX-License-Identifier: Apache-2.0
"""config.json -> TextConfig -> the engine's config: the released shapes, both spellings, RoPE, and hostile files."""

import copy
import math
import random

import numpy as np
import pytest

from gemma4.errors import FormatError
from gemma4.load.config import parse_config
from gemma4.load.names import text_tensors

S, F = "sliding_attention", "full_attention"
ROPE = {
    F: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    S: {"rope_theta": 10000.0, "rope_type": "default"},
}


def text_config(d_model, period, repeats, heads, kv, mlp, window, **more):
    base = {
        "model_type": "gemma4_text",
        "hidden_size": d_model,
        "num_hidden_layers": period * repeats,
        "layer_types": ([S] * (period - 1) + [F]) * repeats,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 256,
        "global_head_dim": 512,
        "intermediate_size": mlp,
        "sliding_window": window,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 262144,
        "final_logit_softcapping": 30.0,
        "rope_parameters": ROPE,
        "use_bidirectional_attention": "vision",
    }
    return base | more


RELEASED = {
    "E2B": text_config(
        1536,
        5,
        7,
        8,
        1,
        6144,
        512,
        hidden_size_per_layer_input=256,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        max_position_embeddings=131072,
        use_bidirectional_attention=None,
    ),
    "E4B": text_config(
        2560,
        6,
        7,
        8,
        2,
        10240,
        512,
        hidden_size_per_layer_input=256,
        num_kv_shared_layers=18,
        max_position_embeddings=131072,
        use_bidirectional_attention=None,
    ),
    "12B": text_config(
        3840,
        6,
        8,
        16,
        8,
        15360,
        1024,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        model_type="gemma4_unified_text",
    ),
    "26B": text_config(
        2816,
        6,
        5,
        16,
        8,
        2112,
        1024,
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "31B": text_config(5376, 6, 10, 32, 16, 21504, 1024, attention_k_eq_v=True, num_global_key_value_heads=4),
}
OUTER = {"12B": "gemma4_unified"}
SMALL = text_config(64, 6, 1, 4, 2, 96, 16, vocab_size=128, head_dim=8, global_head_dim=16)


def multimodal(name):
    return {"model_type": OUTER.get(name, "gemma4"), "text_config": RELEASED[name], "tie_word_embeddings": True}


def reference_class(model_type):
    import transformers

    return transformers.Gemma4UnifiedTextConfig if "unified" in model_type else transformers.Gemma4TextConfig


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes(name):
    config = parse_config(multimodal(name))
    engine = config.engine("BF16")
    raw = RELEASED[name]
    for i, (layer, kind) in enumerate(zip(engine["layers"], raw["layer_types"], strict=True)):
        full = kind == F
        assert layer["window"] == (0 if full else raw["sliding_window"])
        assert layer["head_dim"] == (512 if full else 256)
        kv = raw.get("num_global_key_value_heads") if full else None
        assert layer["n_kv_heads"] == (kv or raw["num_key_value_heads"])
        assert layer["k_eq_v"] == (full and raw.get("attention_k_eq_v", False))
        assert layer["moe"] == (name == "26B")
        assert engine["rope_inv_freq"][layer["rope"]].shape == (layer["head_dim"] // 2,)
        assert layer["d_mlp"] == (12288 if name == "E2B" and i >= 15 else raw["intermediate_size"])
    donors = {"E2B": (15, 13, 14), "E4B": (24, 22, 23)}.get(name)
    for i, layer in enumerate(engine["layers"]):
        shared = donors is not None and i >= donors[0]
        assert layer["kv_source"] == (donors[1 + (raw["layer_types"][i] == F)] if shared else i)
    assert config.first_shared_layer == (donors[0] if donors else config.n_layers)
    assert engine["d_ple"] == (256 if name in ("E2B", "E4B") else 0)
    assert engine["context_length"] == (131072 if name in ("E2B", "E4B") else 262144)
    assert config.bidirectional == (None if name in ("E2B", "E4B") else "vision")
    assert (engine["n_experts"], engine["top_k_experts"], engine["d_expert"]) == (
        (128, 8, 704) if name == "26B" else (0, 0, 0)
    )
    assert engine["logit_softcap"] == 30.0 and engine["rms_norm_eps"] == 1e-6 and config.tied


@pytest.mark.parametrize("name", RELEASED)
def test_tensor_shapes_are_the_reference_model_s(name):
    """Every text tensor's name and shape, against the reference model built without memory."""
    torch = pytest.importorskip("torch")
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel
    from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedTextModel

    raw = copy.deepcopy(RELEASED[name])
    model_type = raw.pop("model_type")
    unified = model_type == "gemma4_unified_text"
    config = reference_class(model_type)(**raw)
    with torch.device("meta"):
        model = (Gemma4UnifiedTextModel if unified else Gemma4TextModel)(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert text_tensors(parse_config(multimodal(name))) == expected


@pytest.mark.parametrize("name", RELEASED)
def test_both_spellings_agree(name):
    """What transformers writes back (per_layer_config) means the same as the released file (global_head_dim …)."""
    pytest.importorskip("transformers")
    raw = copy.deepcopy(RELEASED[name])
    saved = reference_class(raw.pop("model_type"))(**raw).to_dict()
    assert "per_layer_config" in saved and "global_head_dim" not in saved
    assert parse_config(saved) == parse_config(RELEASED[name])


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_defaults_are_the_reference_class_s(model_type):
    pytest.importorskip("transformers")
    assert parse_config({"model_type": model_type}) == parse_config(reference_class(model_type)().to_dict())


EARLIER = {"gemma2": "Gemma2Config", "gemma3_text": "Gemma3TextConfig", "vaultgemma": "VaultGemmaConfig"}
OLD_GEMMA3 = {
    "rope_theta": 1_000_000,
    "rope_local_base_freq": 10_000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window_pattern": 6,
}


@pytest.mark.parametrize("model_type", EARLIER)
def test_earlier_defaults_are_the_reference_class_s(model_type):
    transformers = pytest.importorskip("transformers")
    reference = getattr(transformers, EARLIER[model_type])
    assert parse_config({"model_type": model_type}) == parse_config(reference().to_dict())


def test_the_published_config_of_gemma_3_leaves_keys_out():
    """4B: heads, head size and vocabulary are the class's; its query scale is not that of 27B."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = parse_config({"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 106]})
    assert (config.n_heads, config.n_kv_heads[0], config.head_dim[0], config.d_vocab) == (8, 4, 256, 262208)
    assert [i for i, kind in enumerate(config.layer_types) if kind == F] == [5, 11, 17, 23, 29]
    assert config.attention_scale == 1 / 16 and config.eos_token_ids == (1, 106) and config.logit_softcap == 0
    assert config.rope[F].factor == 8 and config.rope[F].theta == 1e6 and config.rope[S].theta == 1e4
    assert all(layer["ahead"] for layer in config.engine()["layers"])
    assert parse_config(text | {"query_pre_attn_scalar": 168}).attention_scale == 168**-0.5


@pytest.mark.parametrize("pattern", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_both_dialects_of_gemma_3_agree(pattern):
    transformers = pytest.importorskip("transformers")
    old = {"model_type": "gemma3_text", "num_hidden_layers": 13} | OLD_GEMMA3
    old[pattern] = old.pop("sliding_window_pattern")
    new = transformers.Gemma3TextConfig(num_hidden_layers=13, **OLD_GEMMA3).to_dict()
    assert new["rope_parameters"][F]["rope_type"] == "linear" and "rope_scaling" not in new
    assert parse_config(old) == parse_config(new)


@pytest.mark.parametrize("factor", [1.0, 8.0, 3.0])
def test_linear_rope_frequencies(factor):
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    raw = OLD_GEMMA3 | {"rope_scaling": {"factor": factor, "rope_type": "linear"}}
    engine = parse_config({"model_type": "gemma3_text", **raw}).engine()
    reference = Gemma3RotaryEmbedding(transformers.Gemma3TextConfig(**raw))
    for i, kind in ((0, S), (5, F)):
        ours = engine["rope_inv_freq"][engine["layers"][i]["rope"]]
        theirs = getattr(reference, f"{kind}_inv_freq").numpy()
        assert np.all(np.abs(ours - theirs) <= 2 * np.spacing(theirs))  # of the power, and of the division


@pytest.mark.parametrize("model_type", EARLIER)
def test_earlier_tensors_are_the_reference_model_s(model_type):
    torch = pytest.importorskip("torch")
    import transformers

    raw = {"num_hidden_layers": 7, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 99, "head_dim": 8}
    config = getattr(transformers, EARLIER[model_type])(**raw)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert text_tensors(parse_config(raw | {"model_type": model_type})) == expected


@pytest.mark.parametrize(
    ("model_type", "values", "error", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 0}, FormatError, "query_pre_attn_scalar"),
        ("gemma2", {"query_pre_attn_scalar": None}, FormatError, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, FormatError, "attn_logit_softcapping"),
        ("gemma2", {"attn_logit_softcapping": "50"}, FormatError, "attn_logit_softcapping"),
        ("gemma2", {"rope_parameters": ROPE}, FormatError, "one object for all layers"),
        ("gemma2", {"rope_scaling": {"rope_type": "linear"}}, FormatError, "factor"),
        ("gemma2", {"layer_types": [S]}, FormatError, "layer_types"),
        ("gemma2", {"head_dim": 7}, FormatError, "head_dim"),
        ("gemma2", {"num_key_value_heads": 3}, FormatError, "num_key_value_heads"),
        ("gemma2", {"use_bidirectional_attention": True}, NotImplementedError, "use_bidirectional_attention"),
        ("gemma2", {"attention_bias": True}, NotImplementedError, "attention_bias"),
        ("gemma2", {"hidden_activation": "silu"}, NotImplementedError, "silu"),
        ("gemma3_text", {"sliding_window": None}, FormatError, "sliding_window"),
        ("gemma3_text", {"sliding_window_pattern": 0}, FormatError, "sliding_window_pattern"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, FormatError, "one entry per layer type"),
        ("gemma3_text", {"rope_scaling": 8}, FormatError, "rope_parameters"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, FormatError, "factor"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 8}}, NotImplementedError, "yarn"),
        ("gemma3_text", {"use_bidirectional_attention": True}, NotImplementedError, "embedding"),
    ],
)
def test_bad_values_of_earlier_models(model_type, values, error, words):
    with pytest.raises(error, match=words):
        parse_config({"model_type": model_type} | values)


def test_no_window_is_needed_where_every_layer_is_global():
    config = parse_config({"model_type": "gemma3_text", "sliding_window": None, "layer_types": [F] * 26})
    assert {layer["window"] for layer in config.engine()["layers"]} == {0}


def test_last_layer_is_global():
    raw = SMALL | {"layer_types": [S] * 6}
    assert parse_config(raw).layer_types == (S, S, S, S, S, F)


@pytest.mark.parametrize(
    ("head_dim", "global_head_dim", "theta", "partial", "factor"),
    [
        (256, 512, 1e6, 0.25, 1.0),
        (8, 16, 1e6, 0.25, 1.0),
        (16, 24, 5e4, 0.4, 2.0),
        (64, 64, 1e4, 1.0, 8.0),
        (2, 2, 1e4, 0, 1),
    ],
)
def test_rope_frequencies(head_dim, global_head_dim, theta, partial, factor):
    """As the reference's buffers. torch's vectorised float32 pow is up to 0.52 ulp off, ours rounds to nearest."""
    pytest.importorskip("torch")
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    rope = {
        F: {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": partial, "factor": factor},
        S: {"rope_type": "default", "rope_theta": 10000.0},
    }
    raw = SMALL | {"head_dim": head_dim, "global_head_dim": global_head_dim, "rope_parameters": rope}
    engine = parse_config(copy.deepcopy(raw)).engine()
    raw.pop("model_type")
    reference = Gemma4TextRotaryEmbedding(Gemma4TextConfig(**raw))
    for layer, kind in zip(engine["layers"], raw["layer_types"], strict=True):
        ours, theirs = engine["rope_inv_freq"][layer["rope"]], getattr(reference, f"{kind}_inv_freq").numpy()
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        assert np.array_equal(ours == 0, theirs == 0)
        assert np.all(np.abs(ours - theirs) <= np.spacing(theirs))
        assert np.mean(ours != theirs) <= 0.05


def test_embed_scale_is_rounded_to_the_table_s_dtype():
    torch = pytest.importorskip("torch")
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding

    for d_model in (64, 1536, 2560, 2816, 3840, 5376, 100):
        config = parse_config(SMALL | {"hidden_size": d_model})
        for ours, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
            table = Gemma4TextScaledWordEmbedding(4, 1, 0, embed_scale=d_model**0.5)
            table.weight = torch.nn.Parameter(torch.ones(4, 1, dtype=dtype), requires_grad=False)
            assert config.engine(ours)["embed_scale"] == float(table(torch.tensor([1])))


def test_token_ids_and_tying():
    raw = {"model_type": "gemma4", "text_config": SMALL | {"eos_token_id": 1}, "eos_token_id": [1, 106]}
    config = parse_config(raw)
    assert config.eos_token_ids == (1, 106) and config.bos_token_id == 2 and config.pad_token_id == 0 and config.tied
    assert not parse_config(raw | {"tie_word_embeddings": False}).tied
    assert not parse_config(SMALL | {"tie_word_embeddings": False}).tied


def change(**values):
    return SMALL | values


HUGE = 10**30
BAD_VALUES = [
    (name, value)
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "global_head_dim",
        "intermediate_size",
        "sliding_window",
        "vocab_size",
        "max_position_embeddings",
    )
    for value in (0, -1, HUGE, 10**5000, 1.0, "8", None, True, [8], {}, float("nan"))
]
BAD_VALUES += [
    ("hidden_size_per_layer_input", -1),
    ("hidden_size_per_layer_input", HUGE),
    ("hidden_size_per_layer_input", "4"),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", None),
    ("rms_norm_eps", float("inf")),
    ("rms_norm_eps", 1.0),
    ("rms_norm_eps", 0.99999999999),
    ("rms_norm_eps", HUGE),
    ("final_logit_softcapping", 0),
    ("final_logit_softcapping", -30.0),
    ("final_logit_softcapping", float("inf")),
    ("final_logit_softcapping", "30"),
    ("final_logit_softcapping", 10**400),
    ("layer_types", "full_attention"),
    ("layer_types", []),
    ("layer_types", [F] * 5),
    ("layer_types", {"0": F}),
    ("layer_types", [F, S, "chunked_attention", S, S, F]),
    ("layer_types", [None] * 6),
    ("layer_types", [[F]] * 6),
    ("num_key_value_heads", 3),
    ("head_dim", 7),
    ("global_head_dim", 9),
    ("num_kv_shared_layers", -1),
    ("num_kv_shared_layers", 6),
    ("num_kv_shared_layers", 7),
    ("num_kv_shared_layers", 1),
    ("num_kv_shared_layers", "2"),
    ("attention_k_eq_v", 1),
    ("attention_k_eq_v", "yes"),
    ("attention_bias", "no"),
    ("tie_word_embeddings", None),
    ("use_double_wide_mlp", 2),
    ("enable_moe_block", "true"),
    ("rope_parameters", []),
    ("rope_parameters", {}),
    ("rope_parameters", {F: None, S: None}),
    ("rope_parameters", ROPE | {F: {"rope_type": "default"}}),
    ("rope_parameters", ROPE | {F: {"rope_type": "default", "rope_theta": 0}}),
    ("rope_parameters", ROPE | {F: {"rope_type": "default", "rope_theta": float("nan")}}),
    ("rope_parameters", ROPE | {F: {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 1.5}}),
    ("rope_parameters", ROPE | {F: {"rope_type": "proportional", "rope_theta": 1e4, "factor": 0}}),
    ("per_layer_config", []),
    ("per_layer_config", {"6": {"head_dim": 8}}),
    ("per_layer_config", {"-1": {"head_dim": 8}}),
    ("per_layer_config", {"x": {"head_dim": 8}}),
    ("per_layer_config", {"9" * 5000: {"head_dim": 8}}),
    ("per_layer_config", {"1": {"head_dim": 8}, "01": {"head_dim": 8}}),
    ("per_layer_config", {"5": 16}),
    ("per_layer_config", {"5": {"head_dim": 0}}),
    ("per_layer_config", {"5": {"head_dim": None}}),
    ("per_layer_config", {"5": {"num_key_value_heads": 3}}),
    ("per_layer_config", {"0": {"head_dim": 16}}),
    ("use_bidirectional_attention", "both"),
    ("use_bidirectional_attention", True),
    ("eos_token_id", -2),
    ("eos_token_id", ["1"]),
    ("eos_token_id", list(range(65))),
    ("bos_token_id", HUGE),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda v: str(v)[:40] if not isinstance(v, int) else "int")
def test_bad_values_are_format_errors_that_name_the_field(name, value):
    with pytest.raises(FormatError) as caught:
        parse_config(change(**{name: value}))
    assert name.split("_")[-1] in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "values",
    [
        {"num_experts": None},
        {"num_experts": 0},
        {"top_k_experts": 5},
        {"top_k_experts": 0},
        {"top_k_experts": None},
        {"moe_intermediate_size": None},
        {"moe_intermediate_size": -8},
        {"num_experts": 4.0},
    ],
)
def test_bad_experts(values):
    moe = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    assert parse_config(change(**moe)).n_experts == 4
    with pytest.raises(FormatError):
        parse_config(change(**moe | values))


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        "gemma4",
        {},
        {"model_type": None},
        {"model_type": "gemma4"},
        {"model_type": "gemma4", "text_config": []},
    ],
)
def test_not_a_config(raw):
    with pytest.raises(FormatError):
        parse_config(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model_type": "gemma3n"}, "gemma3n"),
        ({"model_type": "gemma4_assistant"}, "gemma4_assistant"),
        ({"model_type": 4, "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        (change(attention_bias=True), "attention_bias"),
        (change(hidden_activation="silu"), "silu"),
        (change(use_bidirectional_attention="all"), "all"),
        (change(rope_parameters=ROPE | {F: {"rope_type": "yarn", "rope_theta": 1e4}}), "yarn"),
        (change(per_layer_config={"5": {"intermediate_size": 8}}), "intermediate_size"),
        (change(per_layer_config={"5": {"skip": ["mlp"]}}), "skip"),
    ],
)
def test_unsupported_is_named(raw, words):
    with pytest.raises(NotImplementedError, match=words) as caught:
        parse_config(raw)
    if "model_type" in raw and raw["model_type"] != "gemma4_text":
        assert "gemma4_unified" in str(caught.value)  # lists what is supported


def test_random_damage_raises_only_our_errors():
    """2,000 random edits of valid configs: each parses or raises FormatError / NotImplementedError, nothing else."""
    rng = random.Random(0)
    junk = [
        None,
        True,
        0,
        1,
        -1,
        2,
        7,
        HUGE,
        0.5,
        float("nan"),
        -math.inf,
        "",
        "x",
        [],
        [0],
        [[]],
        {},
        {"a": 1},
        "0" * 99,
    ]
    parsed = 0
    for _ in range(2000):
        raw = copy.deepcopy(rng.choice([SMALL, multimodal("E2B"), RELEASED["26B"], RELEASED["12B"]]))
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            target = raw
            while True:
                key = rng.choice(list(target))
                if isinstance(target[key], dict) and target[key] and rng.random() < 0.8:
                    target = target[key]
                    continue
                target[key] = rng.choice(junk)
                break
        try:
            parse_config(raw).engine("BF16")
            parsed += 1
        except (FormatError, NotImplementedError):
            pass
    assert 200 < parsed < 2000
