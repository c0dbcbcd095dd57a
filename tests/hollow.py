"""Large checkpoints that cost no disk."""

import json
import math
import shutil
from pathlib import Path

from baton.cli.config import shipped_model
from baton.engine.config import load_model_config
from baton.engine.weights import expected_shapes


def hollow_checkpoint(directory: Path, *, num_layers: int) -> int:
    """Makes a Llama in bfloat16 of about 100 MiB a layer, whose weights are a hole in their file, and with it 0. Returns their bytes."""
    shutil.copytree(shipped_model(), directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    header, end = dict[str, object](), 0
    for name, shape in expected_shapes(load_model_config(directory), "model.").items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return end
