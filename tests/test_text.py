import pytest
import torch

from minwm.core.config import ConfigError, UserError
from minwm.nets.text import TextEncoder, WordText


def test_shape_padding_and_null_prompt() -> None:
    text: TextEncoder = WordText(dim=32, length=5)
    states = text.encode(["a red tower", ""])["text"]
    assert states.shape == (2, 5, 32) and states.dtype == torch.float32
    assert states[0, :3].abs().sum(-1).min() > 1
    assert not states[0, 3:].any() and not states[1].any()
    assert text.encode([])["text"].shape == (0, 5, 32)


def test_a_state_is_its_word_and_the_word_before() -> None:
    a, b = WordText(dim=64).encode(["A red, tower", "blue tower of red"])["text"]
    assert torch.equal(a[1, :32], b[3, :32]) and torch.equal(a[2, :32], b[1, :32])
    assert torch.equal(a[2, 32:], a[1, :32]) and torch.equal(b[1, 32:], b[0, :32])
    assert torch.equal(a[0, 32:], b[0, 32:]), "the start is a word of its own"
    assert not torch.equal(a[0, :32], a[1, :32])


def test_vectors_are_unit_variance_and_nearly_orthogonal() -> None:
    text = WordText(dim=64, length=200)
    x = text.encode([" ".join(f"word{i}" for i in range(200))])["text"][0]
    assert abs(float(x.mean())) < 0.03 and abs(float(x.std()) - 1) < 0.03
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1) - torch.eye(200)
    assert cosine.abs().max() < 0.7


def test_vectors_never_change() -> None:
    expected = torch.tensor([0.7431, 0.8085, -0.0648, -1.2839])
    torch.testing.assert_close(WordText(dim=8).encode(["tower"])["text"][0, 0, :4], expected, atol=1e-4, rtol=0)


def test_errors_name_the_caption_and_the_limit() -> None:
    with pytest.raises(UserError, match=r"'a b c' has 3 words.* takes 2"):
        WordText(length=2).encode(["a b c"])
    with pytest.raises(ConfigError, match=r"text.dim=7"):
        WordText(dim=7)
