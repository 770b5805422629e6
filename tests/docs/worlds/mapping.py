"""A checkpoint for each example: fused and split tensors, Mixtral as its authors publish it, other grids and vocabularies."""

import torch
from safetensors.torch import save_file
from torch import nn, randn
from transformers import MixtralConfig, MixtralForCausalLM


def net(**entries):
    root = nn.Module()
    for name, shape in entries.items():
        *path, leaf = name.split("__")
        module = root
        for segment in path:
            module = module._modules.setdefault(segment, nn.Module()) or module
        module.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    return root


model = net(
    **{f"blocks__0__{part}__{leaf}": (8, 8)[: 2 if leaf == "weight" else 1] for part in "qkv" for leaf in ("weight", "bias")},
    blocks__0__experts__gate_up_proj=(4, 12, 8),
    blocks__0__out__weight=(8, 6),
    student__weight=(3, 3),
    teacher__weight=(3, 3),
)  # fmt: skip
original = {"blocks.0.qkv.weight": randn(24, 8), "blocks.0.qkv.bias": randn(24), "encoder.weight": randn(3, 3)}
original |= {f"blocks.0.experts.{e}.{w}.weight": randn(6, 8) for e in range(4) for w in ("w1", "w3")}
save_file(original | {"blocks.0.c_proj.weight": randn(6, 8)}, "original.safetensors")

mixtral = MixtralForCausalLM(
    MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
)  # fmt: skip
mixtral.save_pretrained("mixtral-original")

vit = net(pos_embed=(1, 1 + 16 * 24, 4), embed_tokens__weight=(7, 4))
save_file({"pos_embed": randn(1, 1 + 14 * 14, 4), "embed_tokens.weight": randn(5, 4)}, "vit.safetensors")


class Tokenizer(dict):
    get_vocab = dict.copy


old_tokenizer = Tokenizer(zip(["[UNK]", "the", "cat", "sat", "mat"], range(5), strict=True))
new_tokenizer = Tokenizer(zip(["[UNK]", "[NEW]", "mat", "sat", "cat", "the", "dog"], range(7), strict=True))

classifier = nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
save_file({"bert.weight": randn(4, 4), "bert.bias": randn(4)}, "bert.safetensors")
