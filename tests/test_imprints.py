"""A device computes the imprint that NumPy does, of any bytes wherever they lie, another for other bytes."""

from __future__ import annotations

import numpy as np
import pytest

from deltackpt import devices, imprints
from deltackpt.imprints import reference

torch = pytest.importorskip("torch")

BLOCK = imprints._BLOCK_SIZE
SIZES = [1, 7, 8, 9, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 13]


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def imprint(data: np.ndarray) -> bytes:
    [found] = imprints.imprints([torch.from_numpy(data)])
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_torch_and_numpy_agree(size: int, offset: int):
    data = noise(size + offset)
    [found] = imprints.imprints([torch.from_numpy(data)[offset:]])
    assert found == reference(data[offset:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("size", SIZES)
def test_a_gpu_and_numpy_agree(size: int):  # pragma: no cover
    data = noise(size + 4)
    [found] = imprints.imprints([torch.from_numpy(data).cuda()[4:]])
    assert found == reference(data[4:])


def test_imprints_of_fixed_bytes_do_not_drift():
    """Two devices of one machine may hold parts of one state."""
    assert reference(np.arange(100, dtype=np.uint8)).hex() == "ee162b40988dc9e241171e3c2125f600"
    assert reference(np.zeros(BLOCK + 1, np.uint8)).hex() == "e808a96d9ecad2e361238888285a7fb1"


def test_what_differs_in_a_bit_in_size_or_in_order_has_another_imprint():
    data = noise(3 * BLOCK // 2 + 5)
    others = [data[:-1], np.append(data, np.uint8(0)), data[::-1].copy()]
    for at in (0, 7, 8, 4095, BLOCK - 1, BLOCK, data.size - 1):
        for bit in (0, 7):
            flipped = data.copy()
            flipped[at] ^= 1 << bit
            others.append(flipped)
    words = data[: data.size // 8 * 8].reshape(-1, 8)
    swapped = data.copy()
    swapped[: words.size].reshape(-1, 8)[[0, 1]] = words[[1, 0]]
    blocks = data.copy()
    blocks[: BLOCK // 2], blocks[BLOCK:][: BLOCK // 2] = data[BLOCK:][: BLOCK // 2], data[: BLOCK // 2]
    others += [swapped, blocks]
    assert len({imprint(other) for other in [data, *others]}) == len(others) + 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_signs_that_flip_in_pairs_are_seen(dtype: str):
    """As a sum of words times odd keys would not see them: each flip moves only its highest bit."""
    x = np.random.default_rng(0).standard_normal(1024).astype(dtype)
    seen = {imprint(x.view(np.uint8))}
    for i in range(0, 1024, 16):
        flipped = x.copy()
        flipped[[i, i + 8]] *= -1
        seen.add(imprint(flipped.view(np.uint8)))
    assert len(seen) == 65


def test_all_imprints_of_a_device_come_over_the_bus_together(monkeypatch: pytest.MonkeyPatch):
    fetched = []
    fetch = devices.fetch
    imprint(noise(10))  # whether the device computes as others is asked once
    monkeypatch.setattr(imprints, "fetch", lambda raw: fetched.append(raw.numel()) or fetch(raw))
    arrays = [noise(size) for size in (1, 100_000, BLOCK + 1)]
    found = imprints.imprints(map(torch.from_numpy, arrays))
    assert found == list(map(reference, arrays))
    assert fetched == [16 * 4]
    assert imprints.imprints([]) == []


def test_a_device_that_computes_otherwise_or_not_at_all_is_not_asked(monkeypatch, caplog):
    imprints._is_exact.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(imprints, "reference", lambda data: b"another")
        assert imprints.imprints([torch.zeros(8, dtype=torch.uint8)]) == [None]
    assert "cpu does not compute as others do" in caplog.text
    imprints._is_exact.cache_clear()
    lanes = imprints._lanes

    def no_room(raw):
        if raw.numel() == 9:
            raise RuntimeError("out of memory")
        return lanes(raw)

    monkeypatch.setattr(imprints, "_lanes", no_room)
    eight, nine = torch.zeros(8, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    assert imprints.imprints([nine, eight]) == [None, reference(np.zeros(8, np.uint8))]
    assert "cpu is looked at by copying it: out of memory" in caplog.text
