"""The demo model as a GGUF file, in the form of llama.cpp's converter; written apart from the binary's own reader."""
from __future__ import annotations

import json
import struct
from pathlib import Path

from .program import REPOSITORY

DEMO = REPOSITORY / "handler-tests/fixtures/demo-model"
# Numbers of ggml's types, numbers in a block and its bytes.
TYPES = {"F32": (0, 1, 4), "Q8_0": (8, 32, 34), "BF16": (30, 1, 2)}
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(of) -> bytes:
    """A number, string, boolean or list, with its type before it."""
    if isinstance(of, bool):
        return struct.pack("<IB", 7, of)
    if isinstance(of, int):
        return struct.pack("<II", 4, of)
    if isinstance(of, float):
        return struct.pack("<If", 6, of)
    if isinstance(of, str):
        return struct.pack("<I", 8) + text(of)
    body = b"".join(value(item)[4:] for item in of)
    # Lists of integers are signed.
    kind = {str: 8, float: 6, int: 5}[type(of[0])]
    return struct.pack("<IIQ", 9, kind, len(of)) + body


def fields(message: bytes):
    """The fields of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = message[at]
            at += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or varint()
        yield tag >> 3, message[at : at + size]
        at += size


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    tokens, scores, types = [], [], []
    for number, piece in fields((DEMO / "tokenizer.model").read_bytes()):
        if number == 1:
            piece = dict(fields(piece))
            tokens.append(piece[1].decode())
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            types.append(piece.get(3, 1))
    added = json.loads((DEMO / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    for id, token in sorted(added.items(), key=lambda item: int(item[0])):
        kind = 3 if token["special"] else 4
        if int(id) < len(tokens):
            types[int(id)] = 2 if token["content"] == "<unk>" else kind
            continue
        tokens, scores, types = tokens + [token["content"]], scores + [-1000.0], types + [kind]
    # Rows of the embedding without a token, as the converter fills them.
    rest = range(len(tokens), json.loads((DEMO / "config.json").read_text())["vocab_size"])
    return tokens + [f"[PAD{id}]" for id in rest], scores + [-10000.0 for _ in rest], types + [5 for _ in rest]


def metadata() -> dict:
    config = json.loads((DEMO / "config.json").read_text())
    tokens, scores, types = vocabulary()
    return {
        "general.architecture": "ernie4_5",
        "ernie4_5.block_count": config["num_hidden_layers"],
        "ernie4_5.context_length": config["max_position_embeddings"],
        "ernie4_5.embedding_length": config["hidden_size"],
        "ernie4_5.feed_forward_length": config["intermediate_size"],
        "ernie4_5.attention.head_count": config["num_attention_heads"],
        "ernie4_5.attention.head_count_kv": config["num_key_value_heads"],
        "ernie4_5.attention.key_length": config["head_dim"],
        "ernie4_5.attention.value_length": config["head_dim"],
        "ernie4_5.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "ernie4_5.rope.freq_base": float(config["rope_theta"]),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"],
    }


def q8_0(numbers: tuple[float, ...]) -> bytes:
    blocks = []
    for at in range(0, len(numbers), 32):
        block = numbers[at : at + 32]
        scale = max(map(abs, block)) / 127
        blocks.append(struct.pack("<e32b", scale, *(round(number / scale) if scale else 0 for number in block)))
    return b"".join(blocks)


def matrices():
    """Name below the prefix, and rows of numbers as bf16 bits, each with all its inputs."""
    config = json.loads((DEMO / "config.json").read_text())
    data = (DEMO / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, data = json.loads(data[8 : 8 + size]), data[8 + size :]
    kv, inner = config["num_key_value_heads"] * config["head_dim"], config["intermediate_size"]
    fused = {
        "qkv_proj": [("q_proj", config["num_attention_heads"] * config["head_dim"]), ("k_proj", kv), ("v_proj", kv)],
        "up_gate_proj": [("gate_proj", inner), ("up_proj", inner)],
    }
    for name, info in header.items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "BF16"
        shape, bits = info["shape"], data[slice(*info["data_offsets"])]
        words = struct.unpack(f"<{len(bits) // 2}H", bits)
        name = name.removeprefix("ernie.").removeprefix("model.").removesuffix(".weight")
        if len(shape) == 1:
            yield name, [words]
            continue
        rows, columns = shape
        if name == "embed_tokens":
            yield name, [words[row * columns :][:columns] for row in range(rows)]
            continue
        # Paddle's matrices are [in, out].
        turned = [words[out::columns] for out in range(columns)]
        for part, count in fused.get(name.rsplit(".", 1)[1], [(name.rsplit(".", 1)[1], columns)]):
            yield f"{name.rsplit('.', 1)[0]}.{part}", turned[:count]
            turned = turned[count:]


def tensors(kind: str):
    """Name, shape, type and bytes of each tensor."""
    for name, rows in matrices():
        layer, _, rest = name.removeprefix("layers.").partition(".")
        name = f"blk.{layer}.{NAMES[rest]}" if name.startswith("layers.") else NAMES[name]
        shape, words = [len(rows), len(rows[0])], [word for row in rows for word in row]
        if name.endswith("norm"):
            shape = shape[1:]
        elif kind == "BF16":
            yield name, shape, kind, struct.pack(f"<{len(words)}H", *words)
            continue
        wide = struct.pack(f"<{len(words)}I", *(word << 16 for word in words))
        numbers = struct.unpack(f"<{len(words)}f", wide)
        yield (name, shape, "F32", wide) if len(shape) == 1 else (name, shape, kind, q8_0(numbers))


def demo(kind: str, **changes) -> bytes:
    """The file, with matrices of one type. `changes` go over the metadata, dots of keys written as two underscores."""
    entries = {**metadata(), **{key.replace("__", "."): of for key, of in changes.items()}}
    head, data = b"", b""
    for name, shape, of, numbers in tensors(kind):
        head += text(name + ".weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), TYPES[of][0], len(data))
        data += numbers + bytes(-len(numbers) % 32)
    count = head.count(b".weight")
    file = b"GGUF" + struct.pack("<IQQ", 3, count, len(entries)) + b"".join(text(key) + value(of) for key, of in entries.items()) + head
    return file + bytes(-len(file) % 32) + data


def write(path: Path, kind: str, **changes) -> Path:
    path.write_bytes(demo(kind, **changes))
    return path
