"""The declared vocabulary: words that codebases are known to use for one thing, each with its reason and its source.

It is the only knowledge of particular libraries in here. Everything else works from the two trees alone;
`suggest(..., vocabulary=False)` runs without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Synonym:
    """Words of which each codebase uses one.

    Attributes:
        words: The spellings, the first one standing for all. A spelling of several words is written with spaces.
        reason: Why they mean the same.
        source: Which codebases write them.
    """

    words: tuple[str, ...]
    reason: str
    source: str


SYNONYMS = (
    Synonym(("query", "q", "wq", "theta"), "the query projection", "transformers BERT; llama; Megatron; fairseq"),
    Synonym(("key", "k", "wk"), "the key projection", "transformers BERT; llama; fairseq"),
    Synonym(("value", "v", "wv"), "the value projection", "transformers BERT; llama; fairseq"),
    Synonym(
        ("output", "out", "o", "wo"), "the projection after attention, or what leaves a block", "BERT; llama; CLIP"
    ),
    Synonym(("kv", "wkv"), "keys and values in one matrix", "DeepSeek against its transformers port"),
    Synonym(("gate", "wgate"), "a gate's matrix", "DeepSeek against its transformers port"),
    Synonym(
        ("qkv", "wqkv", "query key value", "in proj"), "queries, keys and values in one matrix", "Megatron; timm; torch"
    ),
    Synonym(("attention", "attn", "att", "mha"), "an abbreviation", "timm; llama; fairseq"),
    Synonym(
        (
            "norm",
            "layernorm",
            "layer norm",
            "ln",
            "rmsnorm",
            "rms norm",
            "normalization",
            "layrnorm",
            "bn",
            "batchnorm",
            "batch norm",
            "groupnorm",
            "group norm",
            "gn",
        ),
        "a normalisation layer; which one its tensors and their shapes say",
        "all; torchvision; Keras; detectron2; `layrnorm` is transformers' spelling in CLIP",
    ),
    Synonym(
        ("mlp", "ffn", "ff", "feed forward", "feedforward"),
        "the position-wise network of a block",
        "timm; llama; OpenNMT; OLMo",
    ),
    Synonym(
        ("e score correction bias", "expert bias", "router bias"),
        "what balances the load of a router's experts",
        "transformers DeepSeek-V3; Megatron; dots",
    ),
    Synonym(
        ("layer scale", "ls", "layerscale", "layer scale parameter", "lambda", "gamma"),
        "the gain of a branch",
        "timm; DINOv2 and its transformers port; BEiT; ConvNeXt",
    ),
    Synonym(("register", "storage"), "tokens beside the patches", "DINOv2 and its transformers port; DINOv3"),
    Synonym(
        ("cross attention", "cross attn", "crossattention", "encoder attention", "encoder attn", "context attention"),
        "attention to another sequence",
        "whisper; fairseq; transformers BART; OpenNMT",
    ),
    Synonym(("embed", "embedding", "emb", "embedder"), "an abbreviation", "all"),
    Synonym(("position", "pos", "positional"), "an abbreviation", "timm; CLIP"),
    Synonym(("conv", "conv1d", "conv2d", "conv3d", "convolution"), "the dimension is in the shape", "all; detectron2"),
    Synonym(("encoder", "enc"), "an abbreviation", "all"),
    Synonym(("decoder", "dec"), "an abbreviation", "all"),
    Synonym(("vision", "visual"), "the image side of a model of two", "CLIP against transformers"),
    Synonym(("token", "tok"), "an abbreviation", "llama"),
    Synonym(("language", "llm", "lm"), "the text side of a model of two", "multimodal ports of transformers"),
    Synonym(("weight", "kernel"), "the matrix of a layer", "Keras; T5X"),
    Synonym(("bias", "beta"), "the offset of a layer", "Keras; TensorFlow BERT"),
    Synonym(("class", "cls"), "an abbreviation", "BERT; timm"),
    Synonym(("image", "img"), "an abbreviation", "timm; DETR"),
    Synonym(("temporal", "time"), "one axis", "video and audio models"),
)

# Words that say only that there is a layer, a linear map, a list or a wrapper: they tell two tensors apart only where
# two names of one side differ by nothing else.
FILLERS: Mapping[str, str] = {
    "proj": "a linear map", "projection": "a linear map", "dense": "a linear map", "linear": "a linear map",
    "fc": "a linear map", "lin": "a linear map",
    "layer": "an item of a list", "block": "an item of a list", "h": "an item of a list (GPT-2)",
    "resblock": "an item of a list (CLIP)",
    "self": "self-attention is attention", "module": "a wrapper", "param": "a container", "net": "a container",
}  # fmt: skip

# What codebases call the tensors of a layer, and what torch calls them; and of norms, whose `scale` elsewhere is a layer's own.
TENSORS: Mapping[str, str] = {
    "kernel": "weight", "w": "weight", "embedding": "weight", "embeddings": "weight",  # Keras, Flax; OpenAI's GPT-2
    "beta": "bias", "b": "bias",  # Keras, TensorFlow BERT; OpenAI's GPT-2
    "moving_mean": "running_mean", "moving_variance": "running_var",  # Keras
}  # fmt: skip
NORM_TENSORS: Mapping[str, str] = {
    "gamma": "weight", "scale": "weight", "g": "weight",  # Keras, lucidrains; T5X, Flax; OpenAI's GPT-2
    "mean": "running_mean", "var": "running_var",  # Flax
}  # fmt: skip
NORM_ROWS = (frozenset({"gamma", "beta"}), frozenset({"g", "b"}))  # a norm whatever its module is called

# The branches of a block, by the words that name one.
BRANCHES: Mapping[str, str] = {"attention": "attention", "mlp": "mlp", "expert": "mlp"}
# What codebases call the map by which a branch goes back into the width of the model, fillers aside; where its shape says so.
WAYS_BACK = frozenset(
    frozenset(name.split())
    for name in (
        "down", "output",  # transformers Llama; BERT
        "mlp output", "attention output",  # OLMo's `ff_out`, `attn_out`
        "w 2",  # Meta's llama, Mixtral, ESPnet
    )
)  # fmt: skip
# And names of it that are elsewhere the way in (Keras' `dense`, GPT-2's `c_fc`): only where the layout is known as well.
WAYS_BACK_BY_SHAPE = frozenset(
    frozenset(name.split())
    for name in (
        "2", "3", "w 3",  # fairseq, timm; xFormers' SwiGLU as in DINOv2
        "", "c",  # `attn.proj` (timm), `attention.dense` (GPT-NeoX), `mlp.proj` (litGPT); `c_proj` (GPT-2)
    )
)  # fmt: skip

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")  # `first_sub_layer` (NeMo's decoders)

FUSED = "qkv", ("query", "key", "value")  # by their first spellings: one matrix, and the three that it holds

# Words, by their first spellings, of which one is never another, whatever is missing beside them.
APART = (
    frozenset({"query", "key", "value", "kv", "qkv", "output"}),  # the maps of one attention
    frozenset({"attention", "cross attention"}),
    frozenset({"encoder", "decoder"}),
    frozenset({"vision", "text", "audio"}),
    frozenset({"vision", "language", "audio"}),
)


def apart(a: Iterable[str], b: Iterable[str]) -> bool:
    """Whether words of two names are among those that are never each other; nor are two initials, as `H` and `L`."""
    a, b = frozenset(a), frozenset(b)
    initials = [{word for word in words if len(word) == 1 and word.isalpha()} for words in (a, b)]
    if all(initials) and initials[0].isdisjoint(initials[1]):
        return True
    return any(words & a and words & b and not words & a & b for words in APART)


@dataclass(frozen=True, slots=True)
class Phrase:
    """Norms whose names say where they stand; both sides name all of a block's norms in one row.

    Attributes:
        rows: Each row names the same places, in order, as one family of codebases does.
        tells: Whether the names are evidence for the pairs; else they only speak against the others.
        of_stack: Whether it is the ends of a stack that they name, which in a block of it are evidence for nothing.
        of_two: Whether there are two norms: where a third stands beside them, the names of two do not say which.
    """

    rows: tuple[tuple[str, ...], ...]
    reason: str
    source: str
    tells: bool = True
    of_stack: bool = False
    of_two: bool = False


# A norm that stands at another place where it has only one other beside it: (name, the other, what it is read as in a row).
BESIDE = (
    ("post attention norm", "post mlp norm", "norm of attention"),  # transformers' NomicBert, GTE
    ("norm", "final norm", "norm of attention"),  # transformers' Wav2Vec2 and its like, against fairseq
    ("pre mlp norm", "input norm", "post attention norm"),  # Megatron Core
)

PHRASES = (
    Phrase(
        (
            ("input norm", "post attention norm"),
            ("attention norm", "mlp norm"),
            ("attention norm", "final norm"),
            ("norm 1", "norm 2"),
            ("norm before", "norm after"),
        ),
        "the two norms of a pre-norm block: before attention, and between attention and MLP",
        "transformers Llama; Meta's llama; fairseq; timm and CLIP; transformers BEiT",
        of_two=True,
    ),
    Phrase(
        (
            ("norm of attention", "post mlp norm"),
            ("attention norm", "mlp norm"),
            ("attention norm", "final norm"),
            ("attention norm", "output norm"),
            ("attention output norm", "output norm"),
            ("sa norm", "output norm"),
            ("norm 1", "norm 2"),
        ),
        "the two norms of a post-norm block: after attention, and after the MLP",
        "transformers' ports of NomicBert, GTE and Jina; fairseq RoBERTa; BERT; DistilBert",
        of_two=True,
    ),
    Phrase(
        (
            ("embed token", "language head"),
            ("token embed", "output"),
            ("token embed", "mlp output"),
            ("embed in", "embed output"),
            ("embed in", "output"),
        ),
        "the two ends of a language model, of one shape",
        "transformers; Meta's llama, Megatron; OLMo; GPT-NeoX",
    ),
    Phrase(
        (("embed norm", "final norm"), ("input norm", "norm"), ("norm pre", "norm post"), ("pre norm", "post norm")),
        "the two norms of a stack: on its embeddings, and after its last block",
        "Conformer encoders; CLIP (ln_pre, ln_post) against transformers",
        of_stack=True,
    ),
    Phrase(
        (("1", "2"), ("intermediate", "output"), ("mlp 1", "mlp 2"), ("mlp intermediate", "mlp output")),
        "the two maps of an MLP, into its width and back",
        "fairseq, timm; transformers BERT, Wav2Vec2; Megatron; ESPnet",
    ),
    Phrase(
        (("gate", "up", "down"), ("w 1", "w 3", "w 2")),
        "the three maps of a gated MLP; which of w1 and w3 is the gate is each codebase's own choice",
        "transformers Llama; Meta's llama",
        tells=False,
    ),
)
