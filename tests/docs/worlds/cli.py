"""MiniLM's names and shapes, at random; two towers as files, and a model that has both."""

from pathlib import Path

from safetensors.torch import save_file
from torch import randn
from transformers import BertConfig, BertModel

config = BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522,
    max_position_embeddings=512,
)  # fmt: skip
model = BertModel(config)
state = dict(model.state_dict()) | {"embeddings.position_ids": model.embeddings.position_ids.clone()}
save_file({key: value.contiguous() for key, value in state.items()}, "model.safetensors")

save_file({"image.weight": randn(4, 4), "image.bias": randn(4)}, "vision.safetensors")
save_file({"weight": randn(4, 4), "bias": randn(4)}, "text.safetensors")
Path("towers.py").write_text("""
from torch import nn

class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 4), nn.Linear(4, 4)
""")
