# SPDX-License-Identifier: Apache-2.0
"""Many families of transformers as tiny models with random weights, and padded batches for them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

PADDINGS = ("right", "left", "gaps", "ordinary", "square", "single")
VOCABULARY, REGIONS, LENGTH = 60, 5, 12
END = 59  # larger than all other tokens of texts

# --------------------------------------------------------------------------------------------------
# Configurations

# There are fewer positions than tokens in a batch.
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GROUPED = dict(_SIZES, num_key_value_heads=2)
_HEAD_SIZE = dict(_GROUPED, head_dim=8)
_ROBERTA = dict(_SIZES, pad_token_id=1, bos_token_id=0)
_TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_N_EMBD = dict(_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=16)
_D_MODEL = dict(
    _TOKENS,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=16,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
_T5 = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    pad_token_id=0,
    decoder_start_token_id=0,
)
_XLM = dict(
    n_words=VOCABULARY,
    emb_dim=32,
    n_layers=2,
    n_heads=4,
    max_position_embeddings=16,
    pad_index=0,
    pad_token_id=0,
    bos_index=1,
    eos_index=2,
)
_LOCAL = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_IMAGE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    image_size=8,
    patch_size=4,
)
_PAIR = dict(text_config=_SIZES, vision_config=_IMAGE, projection_dim=16)


def _seen(batch: int, numbers: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=numbers)}


def _boxes(batch: dict[str, Tensor], numbers: torch.Generator) -> dict[str, Tensor]:
    """Draw a box for each token; those of padded tokens are like any other."""
    corner = torch.randint(0, 50, (*batch["input_ids"].shape, 2), generator=numbers)
    return {"bbox": torch.cat([corner, corner + 3], -1)}


def _regions(batch: dict[str, Tensor], numbers: torch.Generator) -> dict[str, Tensor]:
    texts = len(batch["input_ids"])
    return {
        "visual_embeds": torch.randn(texts, REGIONS, 24, generator=numbers),
        "visual_attention_mask": torch.ones(texts, REGIONS, dtype=torch.long),
        "visual_token_type_ids": torch.ones(texts, REGIONS, dtype=torch.long),
    }


def _image(batch: dict[str, Tensor], numbers: torch.Generator) -> dict[str, Tensor]:
    return _seen(len(batch["input_ids"]), numbers)


def _objects(batch: dict[str, Tensor], numbers: torch.Generator) -> dict[str, Tensor]:
    texts = len(batch["input_ids"])
    return {
        "visual_feats": torch.randn(texts, REGIONS, 24, generator=numbers),
        "visual_pos": torch.rand(texts, REGIONS, 4, generator=numbers),
    }


def _ended(batch: dict[str, Tensor], numbers: torch.Generator) -> dict[str, Tensor]:
    """End each text by a token that also stands where padding is, as CLIP's tokenizer does."""
    mask, ids = batch["attention_mask"], batch["input_ids"]
    is_last = mask.flip(1).cumsum(1).flip(1) * mask == 1
    return {"input_ids": ids.masked_fill(is_last | (mask == 0), END)}


def _target(batch: dict[str, Tensor], numbers: torch.Generator) -> dict[str, Tensor]:
    """Draw texts for a decoder, of another length than the encoder's."""
    mask = _mask("right", 7, len(batch["input_ids"]), numbers)
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=numbers) * mask
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


@dataclass
class Family:
    """One kind of model.

    `base` is a class, or "" for that of AutoModel. `heads` are from ``HEADS``.
    `extra` draws arguments beside tokens and mask. `behind` counts real tokens that the model adds
    behind each text.
    """

    config: str
    settings: dict[str, object]
    heads: str = ""
    base: str = ""
    extra: Callable | None = None
    behind: int = 0
    keep: dict[str, object] = field(default_factory=dict)

    def make_config(self) -> object:
        """Make its configuration, without dropout."""
        config = getattr(transformers, self.config)(**{**self.settings, **self.keep})
        parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
        for part in parts:
            for name, value in list(vars(part).items()):
                if ("drop" in name or "jitter" in name) and isinstance(value, float):
                    setattr(part, name, 0.0)
        return config


def _family(config: str, settings: dict, heads: str = "", **more: object) -> Family:
    names = ("base", "extra", "behind")
    own = {name: more.pop(name) for name in names if name in more}
    return Family(config, settings, heads, keep=more, **own)


_ALL = "seq tok qa mlm"
ENCODERS = {
    "bert": _family("BertConfig", _SIZES, _ALL),
    "roberta": _family("RobertaConfig", _ROBERTA, _ALL),
    "xlm_roberta": _family("XLMRobertaConfig", _ROBERTA, "seq"),
    "camembert": _family("CamembertConfig", _ROBERTA, "tok"),
    "electra": _family("ElectraConfig", _SIZES, _ALL, embedding_size=16),
    "mpnet": _family("MPNetConfig", _ROBERTA, _ALL),
    "albert": _family("AlbertConfig", _SIZES, _ALL, embedding_size=16),
    "distilbert": _family(
        "DistilBertConfig",
        dict(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, pad_token_id=0),
        _ALL,
        max_position_embeddings=16,
    ),
    "modernbert": _family(
        "ModernBertConfig",
        _SIZES,
        "seq tok mlm",
        cls_token_id=1,
        sep_token_id=2,
        local_attention=6,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "deberta": _family("DebertaConfig", _SIZES, "seq", relative_attention=True, pos_att_type="c2p"),
    "deberta_v2": _family(
        "DebertaV2Config",
        _SIZES,
        "seq tok mlm",
        relative_attention=True,
        position_buckets=4,
        pos_att_type="c2p|p2c",
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    ),
    "convbert": _family("ConvBertConfig", _SIZES, "seq", embedding_size=16, conv_kernel_size=3),
    "longformer": _family("LongformerConfig", _ROBERTA, "seq", attention_window=4),
    "big_bird": _family("BigBirdConfig", _SIZES, "seq", block_size=1, num_random_blocks=1),
    "funnel": _family(
        "FunnelConfig",
        dict(vocab_size=VOCABULARY, d_model=32, n_head=4, d_head=8, d_inner=64, pad_token_id=0),
        "tok",
        base="FunnelModel",
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    "squeezebert": _family("SqueezeBertConfig", _SIZES, "seq", embedding_size=32),
    "roformer": _family("RoFormerConfig", _SIZES, "tok", embedding_size=32),
    "nystromformer": _family(
        "NystromformerConfig",
        _SIZES,
        "seq",
        num_landmarks=LENGTH,
        segment_means_seq_len=LENGTH,
        conv_kernel_size=3,
    ),
    "xlnet": _family(
        "XLNetConfig",
        dict(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=0),
        "tok",
    ),
    "xlm": _family("XLMConfig", _XLM, "tok"),
    "flaubert": _family("FlaubertConfig", _XLM, "tok"),
    "ernie": _family("ErnieConfig", _SIZES, "seq", use_task_id=True),
    "megatron_bert": _family("MegatronBertConfig", _SIZES, "tok"),
    "mobilebert": _family(
        "MobileBertConfig",
        _SIZES,
        "seq",
        embedding_size=32,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
    ),
    "rembert": _family("RemBertConfig", _SIZES, "tok", input_embedding_size=16),
    "data2vec": _family("Data2VecTextConfig", _ROBERTA, "seq"),
    "roberta_prelayernorm": _family("RobertaPreLayerNormConfig", _ROBERTA, "tok"),
    "xmod": _family("XmodConfig", _ROBERTA, "seq", languages=["en", "de"], default_language="en"),
    "ibert": _family("IBertConfig", _ROBERTA, "seq"),
    "splinter": _family("SplinterConfig", _SIZES),
    "esm": _family("EsmConfig", _SIZES, "tok", mask_token_id=5, token_dropout=True),
    "nomic_bert": _family("NomicBertConfig", _SIZES, "seq"),
    "eurobert": _family("EuroBertConfig", _GROUPED, "seq"),
    "luke": _family("LukeConfig", _ROBERTA, "seq", entity_vocab_size=9, entity_emb_size=8),
    "yoso": _family("YosoConfig", _SIZES, "seq", use_expectation=True),
    "canine": _family(
        "CanineConfig",
        _SIZES,
        "seq",
        num_hash_buckets=16,
        local_transformer_stride=4,
        downsampling_rate=4,
        upsampling_kernel_size=4,
    ),
    "bert_generation": _family("BertGenerationConfig", _SIZES),
}

DECODERS = {
    "gpt2": _family("GPT2Config", _N_EMBD, "lm seq tok"),
    "opt": _family("OPTConfig", _SIZES, "lm", ffn_dim=64, word_embed_proj_dim=32),
    "gpt_neox": _family("GPTNeoXConfig", _SIZES, "lm seq"),
    "llama": _family("LlamaConfig", _GROUPED, "lm seq tok qa"),
    "mistral": _family("MistralConfig", _GROUPED, "lm seq", sliding_window=4),
    "qwen2": _family("Qwen2Config", _GROUPED, "lm seq"),
    "qwen3": _family("Qwen3Config", _HEAD_SIZE, "lm seq"),
    "gemma": _family("GemmaConfig", _HEAD_SIZE, "lm seq"),
    "gemma2": _family("Gemma2Config", _HEAD_SIZE, "lm", query_pre_attn_scalar=8, **_LOCAL),
    "gemma3": _family("Gemma3TextConfig", _HEAD_SIZE, "lm", query_pre_attn_scalar=8, **_LOCAL),
    "phi": _family("PhiConfig", _SIZES, "lm"),
    "phi3": _family("Phi3Config", _GROUPED, "lm"),
    "falcon": _family("FalconConfig", _SIZES, "lm", new_decoder_architecture=False),
    "falcon_alibi": _family("FalconConfig", _SIZES, "lm", alibi=True),
    "bloom": _family("BloomConfig", dict(_TOKENS, hidden_size=32, n_layer=2, n_head=4), "lm"),
    "mpt": _family("MptConfig", dict(_TOKENS, d_model=32, n_layers=2, n_heads=4), "lm"),
    "gpt_neo": _family(
        "GPTNeoConfig",
        dict(_TOKENS, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64),
        "lm",
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=16,
    ),
    "gptj": _family("GPTJConfig", _N_EMBD, "lm", rotary_dim=4),
    "codegen": _family("CodeGenConfig", _N_EMBD, "lm", rotary_dim=4),
    "gpt_bigcode": _family("GPTBigCodeConfig", _N_EMBD, "lm"),
    "stablelm": _family("StableLmConfig", _GROUPED, "lm"),
    "mixtral": _family("MixtralConfig", _GROUPED, "lm", output_router_logits=True, **_EXPERTS),
    "qwen2_moe": _family(
        "Qwen2MoeConfig",
        _GROUPED,
        "lm",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "gpt_oss": _family("GptOssConfig", _HEAD_SIZE, "lm", **_EXPERTS, **_LOCAL),
    "olmo2": _family("Olmo2Config", _GROUPED, "lm"),
    "cohere": _family("CohereConfig", _GROUPED, "lm"),
    "starcoder2": _family("Starcoder2Config", _GROUPED, "lm"),
    "persimmon": _family("PersimmonConfig", _SIZES, "lm"),
    "granite": _family("GraniteConfig", _GROUPED, "lm"),
    "smollm3": _family("SmolLM3Config", _GROUPED, "lm"),
    "llama4": _family(
        "Llama4TextConfig",
        _HEAD_SIZE,
        "lm",
        attention_chunk_size=4,
        num_local_experts=2,
        intermediate_size_mlp=64,
    ),
    "biogpt": _family("BioGptConfig", _SIZES, "lm"),
    "xglm": _family(
        "XGLMConfig",
        dict(_TOKENS, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
        "lm",
        max_position_embeddings=16,
    ),
    "ctrl": _family("CTRLConfig", dict(_N_EMBD, dff=64), "lm"),
    "openai": _family("OpenAIGPTConfig", _N_EMBD, "lm"),
    "mamba": _family("MambaConfig", _SIZES, "lm", state_size=4, conv_kernel=3, time_step_rank=4),
    "recurrent_gemma": _family(
        "RecurrentGemmaConfig",
        _GROUPED,
        "lm",
        lru_width=32,
        attention_window_size=4,
        block_types=["recurrent", "attention"],
    ),
    "lfm2": _family(
        "Lfm2Config", _GROUPED, "lm", conv_L_cache=3, layer_types=["conv", "full_attention"]
    ),
    "qwen3_next": _family(
        "Qwen3NextConfig",
        _HEAD_SIZE,
        "lm",
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}

ENCODER_DECODERS = {
    "t5": _family("T5Config", _T5, "s2s", extra=_target),
    "mt5": _family("MT5Config", _T5, "s2s", extra=_target),
    "umt5": _family("UMT5Config", _T5, extra=_target),
    "t5_encoder": _family("T5Config", _T5, "tok", base="T5EncoderModel"),
    "umt5_encoder": _family("UMT5Config", _T5, base="UMT5EncoderModel"),
    "switch_transformers": _family(
        "SwitchTransformersConfig",
        _T5,
        extra=_target,
        num_experts=2,
        expert_capacity=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    "bart": _family("BartConfig", _D_MODEL, "s2s", extra=_target),
    "mbart": _family("MBartConfig", _D_MODEL, "s2s", extra=_target),
    "m2m_100": _family("M2M100Config", _D_MODEL, "s2s", extra=_target),
    "pegasus": _family("PegasusConfig", _D_MODEL, "s2s", extra=_target),
    "blenderbot": _family("BlenderbotConfig", _D_MODEL, "s2s", extra=_target),
    "blenderbot_small": _family("BlenderbotSmallConfig", _D_MODEL, "s2s", extra=_target),
    "plbart": _family("PLBartConfig", _D_MODEL, "s2s", extra=_target),
    "nllb_moe": _family(
        "NllbMoeConfig",
        _D_MODEL,
        extra=_target,
        num_experts=2,
        expert_capacity=3,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    ),
    "marian": _family("MarianConfig", _D_MODEL, "s2s", extra=_target),
    "led": _family(
        "LEDConfig",
        dict(_D_MODEL, max_encoder_position_embeddings=16, max_decoder_position_embeddings=16),
        "s2s",
        extra=_target,
        attention_window=4,
    ),
    "prophetnet": _family(
        "ProphetNetConfig",
        dict(
            _TOKENS,
            hidden_size=32,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=16,
        ),
        extra=_target,
        ngram=2,
    ),
}

OTHERS = {
    "clip_text": _family("CLIPTextConfig", _SIZES, base="CLIPTextModel"),
    "clip_text_ended": _family(
        "CLIPTextConfig",
        dict(_SIZES, pad_token_id=END, eos_token_id=END),
        base="CLIPTextModel",
        extra=_ended,
    ),
    "metaclip_2_text": _family("MetaClip2TextConfig", _SIZES, base="MetaClip2TextModel"),
    "groupvit_text": _family("GroupViTTextConfig", _SIZES, base="GroupViTTextModel"),
    "owlvit_text": _family("OwlViTTextConfig", _SIZES, base="OwlViTTextModel"),
    "clip": _family("CLIPConfig", _PAIR, base="CLIPModel", extra=_image),
    "siglip": _family("SiglipConfig", _PAIR, base="SiglipModel", extra=_image),
    "siglip_text": _family("SiglipTextConfig", _SIZES, base="SiglipTextModel"),
    "chinese_clip": _family("ChineseCLIPConfig", _PAIR, base="ChineseCLIPModel", extra=_image),
    "blip_text": _family(
        "BlipTextConfig", dict(_SIZES, encoder_hidden_size=32), base="BlipTextModel"
    ),
    "visual_bert": _family(
        "VisualBertConfig", dict(_SIZES, visual_embedding_dim=24), extra=_regions, behind=REGIONS
    ),
    "vilt": _family(
        "ViltConfig", dict(_SIZES, image_size=8, patch_size=4), extra=_image, behind=REGIONS
    ),
    "layoutlm": _family("LayoutLMConfig", _SIZES, "seq tok", extra=_boxes),
    "layoutlmv3": _family(
        "LayoutLMv3Config",
        dict(_ROBERTA, coordinate_size=5, shape_size=6, visual_embed=False),
        "tok",
        extra=_boxes,
    ),
    "lilt": _family("LiltConfig", dict(_ROBERTA, hidden_size=48), "tok", extra=_boxes),
    "bros": _family("BrosConfig", dict(_SIZES, hidden_size=64), "tok", extra=_boxes),
    "markuplm": _family("MarkupLMConfig", _ROBERTA, "tok", max_depth=4, xpath_unit_hidden_size=4),
    "lxmert": _family(
        "LxmertConfig",
        dict(_SIZES, visual_feat_dim=24, l_layers=1, r_layers=1, x_layers=1),
        extra=_objects,
    ),
    "tapas": _family("TapasConfig", _SIZES, type_vocab_sizes=[3, 4, 4, 2, 4, 4, 4]),
}

FAMILIES = {**ENCODERS, **DECODERS, **ENCODER_DECODERS, **OTHERS}
HEADS = {
    "seq": "AutoModelForSequenceClassification",
    "tok": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "mlm": "AutoModelForMaskedLM",
    "lm": "AutoModelForCausalLM",
    "s2s": "AutoModelForSeq2SeqLM",
}

# --------------------------------------------------------------------------------------------------
# Models


def make_model(name: str, head: str) -> nn.Module:
    """Make a family's base model, or one with a head, the same at each call.

    Weights are so large that positions, biases and norms matter.
    """
    family = FAMILIES[name]
    config = family.make_config()
    config.num_labels = 2 if head == "qa" else 3
    torch.manual_seed(0)
    if head == "base" and family.base:
        model = getattr(transformers, family.base)(config)
    else:
        auto = getattr(transformers, HEADS.get(head, "AutoModel"))
        model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.15 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape), alpha=scale)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# --------------------------------------------------------------------------------------------------
# Batches


def _mask(padding: str, length: int, texts: int, numbers: torch.Generator) -> Tensor:
    """Draw which tokens are real: two or more of each text, and not all of all texts."""
    lengths = torch.randint(2, length, (texts, 1), generator=numbers)
    lengths[-1], lengths[0] = 2, length // 2
    mask = (torch.arange(length) < lengths).long()
    if padding in ("left", "ordinary"):
        return mask.flip(1)
    if padding == "gaps":
        mask = (torch.rand(texts, length, generator=numbers) < 0.6).long()
        mask[:, :2], mask[:, 2] = 1, 0
    return mask


def make_batch(name: str, head: str, padding: str, seed: int) -> dict[str, Tensor]:
    """Draw tokens and mask, what else the family wants, and labels for the head.

    Parameters
    ----------
    name, head : str
        From ``FAMILIES`` and ``HEADS``, or "base".
    padding : str
        One of ``PADDINGS``. "ordinary" is on the left, by tokens that texts have too; "square" has
        as many texts as tokens, "single" has one text.
    seed : int
    """
    family = FAMILIES[name]
    numbers = torch.Generator().manual_seed(100 * seed + PADDINGS.index(padding))
    length = 8 if padding == "square" else LENGTH
    texts = {"square": 8, "single": 1}.get(padding, 4)
    mask = _mask(padding, length, texts, numbers)
    pad = family.settings.get("pad_token_id", 0)
    ids = torch.randint(6, END, mask.shape, generator=numbers)
    if padding != "ordinary":
        ids = ids.masked_fill(mask == 0, pad)
    batch = {"input_ids": ids, "attention_mask": mask}
    if family.extra is not None:
        batch.update(family.extra(batch, numbers))
    labels = ids.masked_fill(mask == 0, -100)
    if head == "seq":
        batch["labels"] = torch.randint(0, 3, (texts,), generator=numbers)
    elif head == "tok":
        batch["labels"] = torch.where(labels >= 0, labels % 3, labels)
    elif head in ("mlm", "lm"):
        batch["labels"] = labels
    elif head == "s2s":
        ids, mask = batch.pop("decoder_input_ids"), batch.pop("decoder_attention_mask")
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    elif head == "qa":
        batch["start_positions"] = mask.argmax(1)
        batch["end_positions"] = mask.argmax(1) + 1
    return batch


def real_tokens(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Say which tokens are real in each hidden state that base models return, by its name."""
    mask = batch["attention_mask"].bool()
    behind = torch.ones(len(mask), FAMILIES[name].behind, dtype=torch.bool)
    return {
        "last_hidden_state": batch.get("decoder_attention_mask", torch.cat([mask, behind], 1)) > 0,
        "encoder_last_hidden_state": mask,
        "language_output": mask,
    }
