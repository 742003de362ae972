#!/usr/bin/env python3
"""Write a checkpoint with seeded random weights at a real model's shapes.

Speed does not depend on the values of weights, so benchmarks run on these where nothing can be downloaded. The text such a model writes is noise: use it for speed, memory and loading,
and compare numbers (logits), never quality.

    scripts/make_checkpoint.py --preset ernie-0.3b --layout paddle --out out/ernie-0.3b-paddle
    scripts/make_checkpoint.py --preset ernie-0.3b --layout pt     --out out/ernie-0.3b-pt --gguf out/ernie-0.3b.gguf
    scripts/make_checkpoint.py --preset qwen3-30b-a3b-4l           --out out/qwen3-moe --gguf out/qwen3-moe.gguf

Needs numpy and safetensors; --gguf (for llama.cpp, same weights) also needs gguf. All from PyPI.
bf16 is rounded to nearest even. The same preset and seed give the same bytes in every layout.
"""
import argparse, json, os
import numpy as np

ERNIE = dict(model_type="ernie4_5", arch="Ernie4_5ForCausalLM", vocab=103424, eps=1e-5, theta=500000.0, tie=True, max_pos=131072)
LLAMA = dict(model_type="llama", arch="LlamaForCausalLM", vocab=128256, eps=1e-5, theta=500000.0, tie=False, max_pos=131072)
QWEN3 = dict(model_type="qwen3", arch="Qwen3ForCausalLM", vocab=151936, eps=1e-6, theta=1000000.0, tie=True, max_pos=40960)
QWEN3_MOE = dict(QWEN3, model_type="qwen3_moe", arch="Qwen3MoeForCausalLM", tie=False)
GEMMA3 = dict(model_type="gemma3_text", arch="Gemma3ForCausalLM", vocab=262144, eps=1e-6, theta=1000000.0, local_theta=10000.0, window=512, pattern=6, tie=True, max_pos=32768)
PRESETS = {
    "ernie-tiny": dict(ERNIE, vocab=2048, hidden=128, inter=384, layers=3, heads=4, kv=2, head_dim=64),
    "ernie-0.3b": dict(ERNIE, hidden=1024, inter=3072, layers=18, heads=16, kv=2, head_dim=128),
    "qwen3-0.6b": dict(QWEN3, hidden=1024, inter=3072, layers=28, heads=16, kv=8, head_dim=128),
    "llama-1b": dict(LLAMA, hidden=2048, inter=8192, layers=16, heads=32, kv=8, head_dim=64, tie=True),
    "llama-8b": dict(LLAMA, hidden=4096, inter=14336, layers=32, heads=32, kv=8, head_dim=128),
    "gemma3-1b": dict(GEMMA3, hidden=1152, inter=6912, layers=26, heads=4, kv=1, head_dim=256),
    # Of its 48 layers 4: about 6 GB.
    "qwen3-30b-a3b-4l": dict(QWEN3_MOE, hidden=2048, inter=768, layers=4, heads=32, kv=4, head_dim=128, experts=128, top_k=8),
    "qwen3-moe-tiny": dict(QWEN3_MOE, vocab=2048, hidden=128, inter=64, layers=2, heads=4, kv=2, head_dim=32, experts=8, top_k=2),
    "gemma3-tiny": dict(GEMMA3, vocab=2048, hidden=128, inter=256, layers=7, heads=4, kv=1, head_dim=32),
}
BOS, EOS, UNK = 1, 2, 0


def bf16(a):
    u = np.ascontiguousarray(a, dtype=np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def tensors(p, seed):
    """Yield (name, f32 array) in the Hugging Face layout: linear weights are [out, in]."""
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.standard_normal(s, dtype=np.float32) * np.float32(0.02)
    gemma, normed = p["model_type"] == "gemma3_text", p["model_type"] in ("qwen3", "qwen3_moe", "gemma3_text")
    # Gemma stores what is added to 1.
    unit = lambda n: (np.zeros if gemma else np.ones)(n, np.float32)
    h, q, kv = p["hidden"], p["heads"] * p["head_dim"], p["kv"] * p["head_dim"]
    yield "model.embed_tokens.weight", normal(p["vocab"], h)
    for i in range(p["layers"]):
        l = f"model.layers.{i}."
        yield l + "input_layernorm.weight", unit(h)
        yield l + "self_attn.q_proj.weight", normal(q, h)
        yield l + "self_attn.k_proj.weight", normal(kv, h)
        yield l + "self_attn.v_proj.weight", normal(kv, h)
        yield l + "self_attn.o_proj.weight", normal(h, q)
        if normed:
            yield l + "self_attn.q_norm.weight", unit(p["head_dim"])
            yield l + "self_attn.k_norm.weight", unit(p["head_dim"])
        yield l + "post_attention_layernorm.weight", unit(h)
        if gemma:
            yield l + "pre_feedforward_layernorm.weight", unit(h)
            yield l + "post_feedforward_layernorm.weight", unit(h)
        if "experts" in p:
            yield l + "mlp.gate.weight", normal(p["experts"], h)
        for e in range(p["experts"]) if "experts" in p else [None]:
            m = l + ("mlp." if e is None else f"mlp.experts.{e}.")
            yield m + "gate_proj.weight", normal(p["inter"], h)
            yield m + "up_proj.weight", normal(p["inter"], h)
            yield m + "down_proj.weight", normal(h, p["inter"])
    yield "model.norm.weight", unit(h)
    if not p["tie"]:
        yield "lm_head.weight", normal(p["vocab"], h)


def pieces(vocab):
    """A vocabulary any text can be written in: specials, digits, 256 bytes, two-letter pieces, filler."""
    out = ["<unk>", "<s>", "</s>"] + [str(d) for d in range(10)] + [f"<0x{b:02X}>" for b in range(256)]
    letters = ["\u2581"] + [chr(c) for c in range(33, 127) if not chr(c).isdigit()]
    pairs = [a + b for a in letters for b in letters if (a == "\u2581" or a.isalpha()) and b.isalpha()]
    room = vocab - len(out) - len(letters)
    pairs = pairs[: max(0, room)]
    out += pairs + letters
    return out + [f"<filler_{i}>" for i in range(vocab - len(out))], pairs


def write_tokenizer(out, vocab):
    names, pairs = pieces(vocab)
    ids = {t: i for i, t in enumerate(names)}
    special = lambda t: dict(id=ids[t], content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    tok = dict(version="1.0", truncation=None, padding=None, added_tokens=[special(t) for t in names[:3]],
               normalizer=dict(type="Replace", pattern=dict(String=" "), content="\u2581"), pre_tokenizer=None, post_processor=None,
               decoder=dict(type="Sequence", decoders=[dict(type="Replace", pattern=dict(String="\u2581"), content=" "), dict(type="ByteFallback"), dict(type="Fuse")]),
               model=dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=True, byte_fallback=True, ignore_merges=False, vocab=ids, merges=[[p[0], p[1]] for p in pairs]))
    json.dump(tok, open(os.path.join(out, "tokenizer.json"), "w"), ensure_ascii=False)
    json.dump(dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", clean_up_tokenization_spaces=False,
                   chat_template="{{ '<s>' }}{%- for m in messages -%}{%- if m.role == 'user' -%}{{ 'User: ' + m.content + '\n' }}{%- elif m.role == 'assistant' -%}{{ 'Assistant: ' + m.content + '</s>' }}{%- else -%}{{ m.content + '\n' }}{%- endif -%}{%- endfor -%}{{ 'Assistant: ' }}"),
              open(os.path.join(out, "tokenizer_config.json"), "w"), indent=1)
    return names


def write_hf(p, seed, layout, out):
    from safetensors.numpy import save_file  # noqa: F401  (header is written by hand below: numpy has no bf16)
    os.makedirs(out, exist_ok=True)
    paddle = layout == "paddle"
    rename = lambda n: ("ernie." + n[6:] if paddle and n.startswith("model.") else n)
    linear = lambda n: n.endswith(("_proj.weight", "mlp.gate.weight")) or n == "lm_head.weight"
    items, header, offset = [], {}, 0
    for name, a in tensors(p, seed):
        a = bf16(a.T if paddle and linear(name) else a)
        header[rename(name)] = dict(dtype="BF16", shape=list(a.shape), data_offsets=[offset, offset + a.nbytes])
        offset += a.nbytes
        items.append(a)
    header["__metadata__"] = dict(format="np" if paddle else "pt")
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(os.path.join(out, "model.safetensors"), "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for a in items:
            f.write(a.tobytes())
    arch = p["arch"].replace("Ernie4_5F", "Ernie4_5_F") if paddle else p["arch"]
    cfg = dict(architectures=[arch], model_type=p["model_type"], hidden_size=p["hidden"], intermediate_size=p["inter"], num_hidden_layers=p["layers"], num_attention_heads=p["heads"],
               num_key_value_heads=p["kv"], head_dim=p["head_dim"], hidden_act="silu", vocab_size=p["vocab"], max_position_embeddings=p["max_pos"], rms_norm_eps=p["eps"], rope_theta=p["theta"],
               tie_word_embeddings=p["tie"], use_bias=False, attention_bias=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)
    if "experts" in p:
        cfg.update(moe_intermediate_size=p["inter"], num_experts=p["experts"], num_experts_per_tok=p["top_k"], norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    if "window" in p:
        cfg.update(hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=p["head_dim"], sliding_window=p["window"], sliding_window_pattern=p["pattern"],
                   rope_local_base_freq=p["local_theta"], attn_logit_softcapping=None, final_logit_softcapping=None)
        del cfg["hidden_act"]
    cfg["dtype" if paddle else "torch_dtype"] = "bfloat16"
    json.dump(cfg, open(os.path.join(out, "config.json"), "w"), indent=1)
    json.dump(dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0, do_sample=True, temperature=0.8, top_p=0.8), open(os.path.join(out, "generation_config.json"), "w"), indent=1)
    write_tokenizer(out, p["vocab"])


def write_gguf(p, seed, path):
    import gguf
    arch = {"ernie4_5": "ernie4_5", "llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}[p["model_type"]]
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(p["max_pos"]); w.add_embedding_length(p["hidden"]); w.add_block_count(p["layers"]); w.add_feed_forward_length(p["inter"])
    w.add_head_count(p["heads"]); w.add_head_count_kv(p["kv"]); w.add_key_length(p["head_dim"]); w.add_value_length(p["head_dim"]); w.add_rope_dimension_count(p["head_dim"])
    w.add_layer_norm_rms_eps(p["eps"]); w.add_rope_freq_base(p["theta"]); w.add_vocab_size(p["vocab"]); w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    if "experts" in p:
        w.add_expert_count(p["experts"]); w.add_expert_used_count(p["top_k"]); w.add_expert_feed_forward_length(p["inter"])
    if "window" in p:
        w.add_sliding_window(p["window"])
    names, pairs = pieces(p["vocab"])
    T = gguf.TokenType
    kinds = [T.UNKNOWN, T.CONTROL, T.CONTROL] + [T.NORMAL] * 10 + [T.BYTE] * 256 + [T.NORMAL] * (len(names) - 269)
    w.add_tokenizer_model("llama"); w.add_tokenizer_pre("default"); w.add_token_list(names); w.add_token_scores([-float(i) for i in range(len(names))]); w.add_token_types(kinds)
    w.add_bos_token_id(BOS); w.add_eos_token_id(EOS); w.add_unk_token_id(UNK); w.add_add_bos_token(False); w.add_add_space_prefix(False)
    gemma, of_experts = arch == "gemma3", {}
    short = dict(input_layernorm="attn_norm", post_attention_layernorm="post_attention_norm" if gemma else "ffn_norm", pre_feedforward_layernorm="ffn_norm", post_feedforward_layernorm="post_ffw_norm", gate="ffn_gate_inp", q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output", q_norm="attn_q_norm", k_norm="attn_k_norm", gate_proj="ffn_gate", up_proj="ffn_up", down_proj="ffn_down")
    for name, a in tensors(p, seed):
        parts = name.split(".")
        if parts[1] == "layers":
            if arch == "llama" and parts[-2] in ("q_proj", "k_proj"):  # llama.cpp rotates neighbouring pairs; Hugging Face rotates halves
                n = p["heads"] if parts[-2] == "q_proj" else p["kv"]
                a = a.reshape(n, 2, a.shape[0] // n // 2, a.shape[1]).swapaxes(1, 2).reshape(a.shape)
            g = f"blk.{parts[2]}.{short[parts[-2]]}.weight"
            if parts[-4] == "experts":  # one tensor of all experts
                of_experts.setdefault(g, []).append(bf16(a))
                if len(of_experts[g]) == p["experts"]:
                    w.add_tensor(g.replace(".weight", "_exps.weight"), np.stack(of_experts.pop(g)).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
                continue
            if parts[-2] == "gate":  # llama.cpp wants routers as f32
                w.add_tensor(g, (bf16(a).astype(np.uint32) << 16).view(np.float32))
                continue
        else:
            g = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}[name]
        if a.ndim == 1:
            w.add_tensor(g, a + 1 if gemma else a)
        else:
            w.add_tensor(g, bf16(a).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--preset", choices=PRESETS, default="ernie-0.3b")
    a.add_argument("--layout", choices=["pt", "paddle"], default="pt")
    a.add_argument("--out"); a.add_argument("--gguf"); a.add_argument("--seed", type=int, default=0)
    o = a.parse_args()
    if o.out:
        write_hf(PRESETS[o.preset], o.seed, o.layout, o.out)
    if o.gguf:
        write_gguf(PRESETS[o.preset], o.seed, o.gguf)
