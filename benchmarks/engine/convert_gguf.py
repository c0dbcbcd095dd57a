"""Writes a checkpoint as GGUF without a vocabulary: llama.cpp's own converter, which refuses the tokenizers of random models.

Run by path, with llama.cpp's sources on PYTHONPATH; takes the converter's arguments.
"""

import convert_hf_to_gguf
from conversion.base import TextModel
from conversion.llama import LlamaModel
from conversion.qwen import Qwen2Model


def no_words(model: TextModel) -> None:
    """The benchmarks draw tokens below the vocabulary's size, which no word then tells."""
    model._set_vocab_none()  # noqa: SLF001
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


if __name__ == "__main__":
    # The converter writes the size of a Llama's vocabulary by itself.
    LlamaModel.set_vocab = TextModel._set_vocab_none  # noqa: SLF001
    Qwen2Model.set_vocab = no_words
    convert_hf_to_gguf.main()
