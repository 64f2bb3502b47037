"""The reader of MXNet's files: every version of the format round-trips, and damage gives nothing but FormatError."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.deploy.mxnet_files import FLAGS, params_bytes
from visard.deploy.mxnet import read_params, read_symbol
from visard.errors import FormatError

ARRAYS = {
    "arg:conv_weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) - 7,
    "arg:fc_bias": np.array([1.5, -2.5], np.float64),
    "aux:moving_var": np.array([0.25], np.float16),
    "arg:größe": np.array([[1, 2, 3]], np.int64),
}


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_every_version_of_the_format_round_trips(tmp_path: Path, version: int) -> None:
    path = tmp_path / "net-0000.params"
    path.write_bytes(params_bytes(ARRAYS, version))
    found = read_params(path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("dtype", FLAGS)
def test_every_value_type(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "net.params"
    path.write_bytes(params_bytes({"arg:a": np.array([0, 1, 100], dtype)}))
    found = read_params(path)["arg:a"]
    assert found.dtype == np.dtype(dtype)
    assert found.tolist() == [0, 1, 100]


def test_truncation_at_every_byte_is_a_format_error(tmp_path: Path) -> None:
    path, whole = tmp_path / "cut.params", params_bytes(ARRAYS)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut\.params at byte \d+: ."):
            read_params(path)


def test_flipped_bits_give_a_format_error_or_other_values(tmp_path: Path) -> None:
    path, whole = tmp_path / "flipped.params", params_bytes(ARRAYS)
    refused = 0
    for position in range(len(whole)):
        for bit in (position % 7, 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = read_params(path)
            except FormatError:
                refused += 1
                continue
            assert len(found) == len(ARRAYS)
            assert sum(array.nbytes for array in found.values()) < len(whole)
    # Lengths, magics, ranks and counts fill about half of so small a file; a reader that believes them refuses none.
    assert refused > 2 * len(whole) / 4


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=200), keep=st.integers(0, 300))
def test_any_bytes_give_a_format_error(tmp_path: Path, noise: bytes, keep: int) -> None:
    path = tmp_path / "noise.params"
    data = params_bytes(ARRAYS)[:keep] + noise
    path.write_bytes(data)
    try:
        found = read_params(path)
    except FormatError:
        return
    assert sum(array.nbytes for array in found.values()) <= len(data)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<QQQ", 0x112, 0, 2**63),
        struct.pack("<QQQ", 0x112, 0, 1) + struct.pack("<IiI4q3i", 0xF993FAC9, 0, 4, *[2**40] * 4, 1, 0, 0),
        struct.pack("<QQQ", 0x112, 0, 1) + struct.pack("<IiI2q3i", 0xF993FAC9, 0, 2, 0, 2**62, 1, 0, 0) + bytes(16),
        struct.pack("<QQQ", 0x112, 0, 1) + struct.pack("<IiI", 0xF993FAC9, 0, 2**31),
        struct.pack("<QQQ", 0x112, 0, 1) + struct.pack("<IiI1q3i", 0xF993FAC9, 0, 1, -4, 1, 0, 0) + bytes(64),
        struct.pack("<QQQQ", 0x112, 0, 0, 2**40),
    ],
    ids=["count", "sizes", "a size of 0 beside a huge one", "rank", "negative size", "names"],
)
def test_a_huge_length_allocates_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "huge.params"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            read_params(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.params"
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(FormatError, match=r"not an MXNet \.params file"):
        read_params(path)
    sparse = bytearray(params_bytes(ARRAYS))
    sparse[28] = 1
    path.write_bytes(sparse)
    with pytest.raises(FormatError, match="sparse"):
        read_params(path)
    twice = params_bytes({"arg:a": np.ones(1, np.float32), "arg:b": np.ones(1, np.float32)}).replace(b"arg:b", b"arg:a")
    path.write_bytes(twice)
    with pytest.raises(FormatError, match="twice"):
        read_params(path)


def test_symbol_operators_know_their_inputs(tmp_path: Path) -> None:
    path = tmp_path / "net-symbol.json"
    nodes = [
        {"op": "null", "name": "data", "inputs": []},
        {"op": "null", "name": "w", "inputs": []},
        {
            "op": "Convolution",
            "name": "c",
            "param": {"kernel": "(3, 3)", "no_bias": "True"},
            "inputs": [[0, 0], [1, 0]],
        },
        {"op": "Activation", "name": "r", "attr": {"act_type": "relu"}, "inputs": [[2, 0, 0]]},
    ]
    path.write_text(json.dumps({"nodes": nodes}))
    conv, relu = read_symbol(path)
    assert (conv.inputs, relu.inputs) == (("data", "w"), (0,))
    assert conv.attribute("kernel", None) == (3, 3)
    assert conv.attribute("no_bias", False) is True
    assert conv.attribute("stride", (1, 1)) == (1, 1)
    assert relu.attribute("act_type", "") == "relu"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"nodes": 3}',
        '{"nodes": [3]}',
        '{"nodes": [{"op": "null"}]}',
        '{"nodes": [{"op": "Flatten", "name": "f", "inputs": [[0, 0, 0]]}]}',
        '{"nodes": [{"op": "Flatten", "name": "f", "inputs": [[]]}]}',
        '{"nodes": [{"op": "Flatten", "name": "f", "inputs": [["a"]]}]}',
        '{"nodes": [{"op": "Flatten", "name": "f", "attrs": 3, "inputs": []}]}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_what_is_no_graph_is_a_format_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "net-symbol.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FormatError, match=r"net-symbol\.json: not a graph"):
        read_symbol(path)
