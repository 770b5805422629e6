"""A small BERT under its own names, a model whose encoder is one, and the same encoder as another codebase names it."""

from pathlib import Path

from torch import randn

Path("net.py").write_text("""
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.output = Attention(), nn.Linear(16, 16)

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(100, 16)
        self.layer = nn.ModuleList(Layer() for _ in range(4))

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(16, 3)
""")

from net import Classifier, Encoder
from safetensors.torch import save_file

bert = {f"bert.{key}": value for key, value in Encoder().state_dict().items()}
save_file(bert | {"cls.weight": randn(100, 16), "cls.bias": randn(100)}, "bert.safetensors")
other = {
    key.replace("bert.embeddings", "tok_emb")
    .replace("bert.layer", "blocks")
    .replace("attention.query", "attn.wq")
    .replace("attention.key", "attn.wk")
    .replace("attention.value", "attn.wv")
    .replace("output", "attn.wo"): value
    for key, value in bert.items()
}
save_file(other, "other.safetensors")
model = Classifier()
