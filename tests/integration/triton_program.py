"""Programs that use tritonclient, as its users write them. Each is run in a process of its own (tritonclient's messages and the router's
have the same names, which one process cannot hold twice) and prints what it saw as JSON.

    python -m tests.integration.triton_program SCENARIO ADDRESS
"""

import json
import sys
from collections.abc import Callable, Mapping
from queue import Queue
from typing import Any

import numpy as np
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

PROMPT = "Once upon a time there was a girl who lived in a house at the edge of a wood."
SAMPLING = {"max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 7, "ignore_eos": True}
DTYPES = {int: np.int32, float: np.float32, bool: np.bool_, str: np.object_}


def tensors(values: Mapping[str, Any], *, rows: bool = False) -> list[triton.InferInput]:
    """Inputs by name; with `rows` of shape [1, n] rather than [n]."""
    made = []
    for name, value in values.items():
        elements = value if isinstance(value, list) else [value]
        array: Any = np.array([elements] if rows else elements, dtype=DTYPES[type(elements[0])])
        tensor = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def seen(result: triton.InferResult) -> dict[str, Any]:
    """Every output of an answer, and what else it says."""
    response = result.get_response()
    values = {output.name: result.as_numpy(output.name).tolist() for output in response.outputs}
    texts = {
        name: [each.decode() if isinstance(each, bytes) else each for each in value]
        for name, value in values.items()
    }
    final = response.parameters["triton_final_response"].bool_param
    return {"id": response.id, "model": response.model_name, "final": final, **texts}


def failure(call: Callable[[], object]) -> list[str]:
    """Status and message of a call that must fail."""
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    raise AssertionError("the call succeeded")


def describe(client: triton.InferenceServerClient) -> Any:
    unknown = tensors({"text_input": PROMPT, "beams": 4})
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("sim"),
        "unknown_model": failure(lambda: client.is_model_ready("other")),
        "unknown_version": failure(lambda: client.get_model_metadata("sim", "2")),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata("sim", as_json=True),
        "config": client.get_model_config("sim", as_json=True),
        "infer_other": failure(lambda: client.infer("other", tensors({"text_input": PROMPT}))),
        "unknown_input": failure(lambda: client.infer("sim", unknown)),
        "stream": failure(
            lambda: client.infer("sim", tensors({"text_input": PROMPT, "stream": True}))
        ),
        "bad_value": failure(
            lambda: client.infer("sim", tensors({"text_input": PROMPT, "top_p": 7.0}))
        ),
    }


def ways(client: triton.InferenceServerClient) -> Any:
    text = {"text_input": PROMPT}
    strings = json.dumps({name: str(value) for name, value in SAMPLING.items()})
    asks = {"exclude_input_in_output": True, "return_finish_reason": True} | {
        f"return_{name}": True
        for name in ("cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
    }
    return {
        "json": seen(client.infer("sim", tensors(text | {"sampling_parameters": strings}))),
        "tensors": seen(client.infer("sim", tensors(text | SAMPLING, rows=True))),
        "parameters": seen(client.infer("sim", tensors(text), parameters=dict(SAMPLING))),
        "ids": seen(client.infer("sim", tensors({"input_ids": [*PROMPT.encode()]} | SAMPLING))),
        "everything": seen(
            client.infer("sim", tensors(text | SAMPLING | asks | {"n": 2}), request_id="all")
        ),
        "named": seen(
            client.infer(
                "sim",
                tensors(text | SAMPLING),
                outputs=[triton.InferRequestedOutput("finish_reason")],
            )
        ),
    }


def stream(client: triton.InferenceServerClient) -> Any:
    """Twelve requests at once, every fourth of them bad, every third in one piece."""
    answers: list[Any] = []

    def take(result: triton.InferResult | None, error: InferenceServerException | None) -> None:
        answers.append(str(error.message()) if error else seen(result))

    client.start_stream(take)
    for number in range(12):
        values: dict[str, Any] = {"text_input": f"{number} {PROMPT}", "stream": bool(number % 3)}
        values |= SAMPLING | {"exclude_input_in_output": True, "return_finish_reason": True}
        if number % 4 == 1:
            values["temperature"] = -1.0
        client.async_stream_infer(
            "sim",
            tensors(values),
            request_id=str(number),
            enable_empty_final_response=True,
        )
    client.stop_stream()
    return answers


def cancel(client: triton.InferenceServerClient) -> Any:
    """Three requests on a stream and one beside it, whose workers hang: all are cancelled once they have begun to answer."""
    answers: Queue[Any] = Queue()
    client.start_stream(lambda result, error: answers.put(error or seen(result)["id"]))
    for number in range(3):
        values = {"text_input": PROMPT, "stream": True, "max_tokens": 10}
        client.async_stream_infer("fake", tensors(values), request_id=str(number))
    begun: set[str] = set()
    while len(begun) < 3:
        begun.add(answers.get(timeout=20))
    other: Queue[Any] = Queue()
    call = client.async_infer(
        "fake",
        tensors({"text_input": PROMPT, "max_tokens": 10}),
        callback=lambda result, error: other.put(result or error),
    )
    client.stop_stream(cancel_requests=True)
    call.cancel()
    while isinstance(error := answers.get(timeout=20), str):
        pass
    return [str(error.status()), str(other.get(timeout=20).status())]


def deadline(client: triton.InferenceServerClient) -> Any:
    """A call with a deadline, and requests with timeouts of their own, in microseconds; their workers hang."""
    values = {"text_input": PROMPT, "max_tokens": 10}
    answers: Queue[Any] = Queue()
    client.start_stream(lambda result, error: answers.put(error or seen(result)))
    client.async_stream_infer("fake", tensors(values), timeout=300_000, request_id="late")
    of_stream = answers.get(timeout=20).message()
    client.stop_stream()
    return {
        "call": failure(lambda: client.infer("fake", tensors(values), client_timeout=0.5)),
        "timeout": failure(lambda: client.infer("fake", tensors(values), timeout=300_000)),
        "stream": of_stream,
    }


SCENARIOS = {each.__name__: each for each in (describe, ways, stream, cancel, deadline)}

if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[2]) as opened:
        json.dump(SCENARIOS[sys.argv[1]](opened), sys.stdout)
