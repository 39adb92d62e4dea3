"""Layers of models that are in memory; those on disk have tests of their own."""

from dissect.engine.layers import InMemory, layers_of
from tests.dissect.helpers import build_pair, decoder_blocks


def test_blocks_in_memory_are_the_models_own_layer_by_layer() -> None:
    pair = build_pair("gpt2")
    layers = layers_of([pair.base, pair.unlearned])
    assert isinstance(layers, InMemory)
    with layers.embedding(), layers.head():
        blocks = list(layers.blocks())
    expected = [decoder_blocks(model.hf) for model in (pair.base, pair.unlearned)]
    assert [[block.whole for block in at_layer] for at_layer in blocks] == [
        list(pair) for pair in zip(*expected, strict=True)
    ]
    assert layers.bytes_read == 0
