"""Reads the scalars in TensorBoard's event files; TensorBoard's own reader imports numpy and much else."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event


def masked_crc(data: bytes) -> int:
    """The checksum of the record format: CRC-32C, rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(path: Path, notes: list[str]) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of the scalars in an event file, up to the first record that is damaged or incomplete.

    A record is its length (8 bytes), a checksum of that (4), the data, and a checksum of them (4). Only the lengths are
    checked: an interruption that damages the data damages the next length too.

    Args:
        path: The file.
        notes: A damaged record is reported here; an incomplete one at the end is not, since the run may be writing it.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    size = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            length, checksum = struct.unpack("<QI", header)
            start = file.tell() - 12
            valid = checksum == masked_crc(header[:8])
            if valid and start + 16 + length > size:
                return
            try:
                event = Event.FromString(file.read(length + 4)[:-4]) if valid else None
            except DecodeError:
                event = None
            if event is None:
                notes.append(f"{path.name} is damaged: what comes after {start} of its {size} bytes is left out")
                return
            yield from _scalars(event)


def _scalars(event: "Event") -> Iterator[tuple[int, str, float]]:
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            yield event.step, value.tag, value.simple_value
        elif kind == "tensor" and value.metadata.plugin_data.plugin_name in ("", "scalars"):
            tensor = value.tensor
            if len(tensor.float_val) == 1:
                yield event.step, value.tag, tensor.float_val[0]
            elif tensor.dtype == 1 and len(tensor.tensor_content) == 4:
                yield event.step, value.tag, struct.unpack("<f", tensor.tensor_content)[0]
