"""Writes a checkpoint as GGUF without a vocabulary: llama.cpp's own converter, which refuses the tokenizers of random models.

Run by path, with llama.cpp's sources on PYTHONPATH; takes the converter's arguments.
"""

import convert_hf_to_gguf
from conversion.base import TextModel
from conversion.llama import LlamaModel
from conversion.qwen import Qwen2Model

if __name__ == "__main__":
    for model in (LlamaModel, Qwen2Model):
        model.set_vocab = TextModel._set_vocab_none  # noqa: SLF001
    convert_hf_to_gguf.main()
