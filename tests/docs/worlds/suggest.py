"""A decoder under two codebases' names, and a set of pairs too small to measure anything."""

from safetensors.torch import save_file
from torch import nn, randn

THEIRS = {
    "attention.wq": (8, 8),
    "attention.wk": (4, 8),
    "attention.wv": (4, 8),
    "attention.wo": (8, 8),
    "feed_forward.down": (8, 12),
}
OURS = dict(
    zip(
        THEIRS,
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"],
        strict=True,
    )
)
theirs, model = {"tok_embeddings.weight": randn(20, 8)}, nn.Module()
model.embed_tokens = nn.Embedding(20, 8)
model.layers = nn.ModuleList()
for i in range(3):
    layer = nn.Module()
    for name, (rows, columns) in THEIRS.items():
        theirs[f"layers.{i}.{name}.weight"] = randn(rows, columns)
        module, leaf = OURS[name].split(".")
        if not hasattr(layer, module):
            layer.add_module(module, nn.Module())
        getattr(layer, module).add_module(leaf, nn.Linear(columns, rows, bias=False))
    model.layers.append(layer)
save_file(theirs, "original.safetensors")
