"""What serves, and which tensors go in and come out: as the protocol's metadata and as Triton's configuration. Pure."""

from collections.abc import Iterator

import baton
from router.kserve.options import INPUTS
from router.kserve.request import OUTPUTS, VERSION
from router.kserve.v2 import inference_pb2 as kserve

NAME = "baton"
EXTENSIONS = ("model_configuration", "parameters")
"""Triton's names for what is served beyond the protocol."""


def server_metadata() -> kserve.ServerMetadataResponse:
    """Of the router."""
    return kserve.ServerMetadataResponse(
        name=NAME, version=baton.__version__, extensions=EXTENSIONS
    )


def model_metadata(model: str) -> kserve.ModelMetadataResponse:
    """Of the model of that name."""
    tensor = kserve.ModelMetadataResponse.TensorMetadata
    return kserve.ModelMetadataResponse(
        name=model,
        versions=[VERSION],
        platform=NAME,
        inputs=[tensor(name=n, datatype=d, shape=[size]) for n, d, size in _inputs()],
        outputs=[tensor(name=n, datatype=d, shape=[size]) for n, d, size in _outputs()],
    )


def model_config(model: str) -> kserve.ModelConfigResponse:
    """Of the model of that name. Every input is optional: one of text_input and input_ids must be there, which no configuration can say."""
    config = kserve.ModelConfig(
        name=model,
        platform=NAME,
        backend=NAME,
        input=[
            kserve.ModelInput(name=n, data_type=_data_type(d), dims=[size], optional=True)
            for n, d, size in _inputs()
        ],
        output=[
            kserve.ModelOutput(name=n, data_type=_data_type(d), dims=[size])
            for n, d, size in _outputs()
        ],
        model_transaction_policy=kserve.ModelTransactionPolicy(decoupled=True),
    )
    return kserve.ModelConfigResponse(config=config)


def _inputs() -> Iterator[tuple[str, str, int]]:
    for name, kind in INPUTS.items():
        yield name, kind.datatype, kind.dims


def _outputs() -> Iterator[tuple[str, str, int]]:
    for name, datatype in OUTPUTS.items():
        yield name, datatype, 1 if name == "num_input_tokens" else -1


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
