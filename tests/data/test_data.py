"""Files of MNIST and CIFAR as tensors, downloads and their errors, and the data modules."""

import builtins
import dataclasses
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TRAIN_IMAGES, write_cifar, write_idx
from torchvision import datasets

import lit_lipschitz
from lit_lipschitz import ConfigurationError, DataError, LitLipschitzError
from lit_lipschitz.data import sources


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_idx_files_are_read_as_torchvision_reads_them(name):
    write_idx(Path("."), name)
    for train in (True, False):
        images, labels = sources.SOURCES[name].load(Path("."), train, verify=True)
        reference = getattr(datasets, name)(".", train=train)
        assert torch.equal(images[:, 0], reference.data)
        assert torch.equal(labels, reference.targets)
        assert images.dtype == torch.uint8


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    ("name", "dataset", "key"),
    [("CIFAR10", datasets.CIFAR10, "labels"), ("CIFAR100", datasets.CIFAR100, "fine_labels")],
)
def test_cifar_batches_are_read_in_their_order(name, dataset, key, protocol):
    base = write_cifar(Path("."), dataset, key, protocol)
    images, labels = sources.SOURCES[name].load(Path("."), train=True, verify=False)
    expected = [pickle.loads((base / file).read_bytes())["data"] for file, _ in dataset.train_list]
    assert images.shape == (TRAIN_IMAGES, 3, 32, 32)
    assert np.array_equal(images.numpy().reshape(TRAIN_IMAGES, -1), np.concatenate(expected))
    assert labels.tolist() == list(range(TRAIN_IMAGES // len(dataset.train_list))) * len(dataset.train_list)


def test_a_pickle_that_would_run_code_is_refused():
    base = write_cifar(Path("."))

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("owned",)

    (base / "data_batch_3").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(DataError, match=r"data_batch_3 can't be read.*mkdir is not admitted"):
        sources.SOURCES["CIFAR10"].load(Path("."), train=True, verify=False)
    assert not Path("owned").exists()


def read_batch(content):
    """What the reader makes of a file of CIFAR-10."""
    Path("batch").write_bytes(content)
    return sources.SOURCES["CIFAR10"].read((Path("batch"),))


def opcodes(array, labels=(0,)):
    """The pickle of a batch whose array is given in opcodes."""
    return (
        b"\x80\x04}"
        + pickle.dumps("data", 2)[2:-1]
        + array
        + b"s"
        + pickle.dumps({"labels": [*labels]}, 2)[3:-1]
        + b"."
    )


def structured(pointer):
    """An array whose dtype claims by its state that the bytes are pointers to objects."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value):
        return b"J" + struct.pack("<i", value)

    objects, void = (b"cnumpy\ndtype\n" + text(kind) + b"\x89\x88\x87R" for kind in ("O8", "V8"))
    field = b"}" + text("a") + objects + number(0) + b"\x86s"
    void += (
        b"(" + number(3) + text("|") + b"N" + text("a") + b"\x85" + field + number(8) + number(1) + number(0) + b"tb"
    )
    raw = struct.pack("<Q", pointer) * 3072
    content = b"(B" + struct.pack("<I", len(raw)) + raw
    return b"cnumpy._core.numeric\n_frombuffer\n" + content + void + number(3072) + b"\x85" + text("C") + b"tR"


def test_numpy_never_rebuilds_an_array_from_the_state_in_a_file():
    with pytest.raises(DataError, match="batch can't be read.*expected an array of bytes"):
        read_batch(opcodes(structured(0x4141414141414141)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02" + b"}" * 2_000_000 + b".", "opcodes"),
        (b"\x80\x02" + b")" + b"\x85" * 100_000 + b".", "nested tuples"),
        (b"\x80\x02}]]s.", "a key of a dict is a list"),
        (b"\x80\x02B\xff\xff\xff\x7f.", "2147483647 bytes"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "list indices"),
        (b"\x80\x02ccollections\nOrderedDict\n)R.", "collections.OrderedDict is not admitted"),
        (b"\x80\x02cnumpy\nndarray\n)\x92.", "NEWOBJ_EX is not admitted"),
        (b"", "truncated"),
    ],
)
def test_a_pickle_that_takes_memory_or_time_is_refused_at_once(content, message):
    with pytest.raises(DataError, match=f"batch can't be read.*{message}"):
        read_batch(content)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, "has the label 10; expected 0 to 9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, -1]}, "has the label -1; expected 0 to 9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 0.5]}, "expected a list of numbers"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "has 2 images and 1 labels"),
        ({"data": np.zeros((3, 1024), np.uint8), "labels": [0]}, "expected images of 3 x 32 x 32"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, "expected an array of bytes"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "has no images"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "labels"),
        ([1, 2], "list indices"),
    ],
    ids=str,
)
def test_a_batch_that_is_whole_and_wrong_is_named(batch, message):
    with pytest.raises(DataError, match=f"^batch .*{message}"):
        read_batch(pickle.dumps(batch))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pixels_are_those_that_numpy_stored(protocol, order):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    content = pickle.dumps({"data": np.asarray(pixels, order=order), "labels": [3, 300 % 10, 9]}, protocol=protocol)
    images, labels = read_batch(content)
    assert np.array_equal(images.numpy().reshape(3, -1), pixels)
    assert labels.tolist() == [3, 0, 9]


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("labels", struct.pack(">2I", 2049, 3) + bytes([0, 9, 10]), "has the label 10; expected 0 to 9"),
        ("images", struct.pack(">4I", 2051, 3, 32, 32) + bytes(3 * 1024), "images of 32 x 32 pixels; expected 28 x 28"),
        ("images", struct.pack(">4I", 2051, 2**32 - 1, 28, 28), "can't be read"),
        ("images", struct.pack(">4I", 2051, 0, 28, 28), "has 0 images"),
        ("images", struct.pack(">4I", 0xD03, 3, 28, 28) + bytes(3 * 784 * 4), "can't be read"),
    ],
)
def test_an_idx_file_that_is_whole_and_wrong_is_named(part, content, message):
    raw = write_idx(Path("."))
    for kind, whole in (("images", struct.pack(">4I", 2051, 3, 28, 28) + bytes(3 * 784)),
                        ("labels", struct.pack(">2I", 2049, 3) + bytes(3))):  # fmt: skip
        (file,) = raw.glob(f"train-{kind}*")
        file.write_bytes(content if kind == part else whole)
    with pytest.raises(DataError, match=f"train-{part}.*{message}"):
        sources.SOURCES["MNIST"].load(Path("."), train=True, verify=True)


def test_a_checksum_that_differs_is_named_and_can_be_skipped():
    write_cifar(Path("."))
    with pytest.raises(DataError, match=r"data_batch_1 does not have the checksum.*--data.verify false"):
        sources.SOURCES["CIFAR10"].load(Path("."), train=True, verify=True)


@pytest.mark.parametrize("victim", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_truncated_idx_file_is_named(victim, keep):
    raw = write_idx(Path("."))
    whole = (raw / victim).read_bytes()
    (raw / victim).write_bytes(whole[: min(keep, len(whole) - 5)])
    with pytest.raises(DataError, match=f"{victim} can't be read: it is truncated"):
        sources.SOURCES["MNIST"].load(Path("."), train=True, verify=True)


def test_a_truncated_pickle_is_named():
    base = write_cifar(Path("."))
    (base / "test_batch").write_bytes((base / "test_batch").read_bytes()[:500])
    with pytest.raises(DataError, match="test_batch can't be read: it is truncated"):
        sources.SOURCES["CIFAR10"].load(Path("."), train=False, verify=False)


def test_as_many_labels_as_images():
    raw = write_idx(Path("."))
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(DataError, match="has 30 images and .* has 10 labels"):
        sources.SOURCES["MNIST"].load(Path("."), train=True, verify=True)


def offline(*args, **kwargs):
    raise OSError("Network is unreachable")


def test_no_network_and_no_files_is_one_message_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(DataError) as caught:
        sources.SOURCES["CIFAR10"].fetch(Path("deep/data"), download=True)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("cifar-10-batches-py/data_batch_1", str(Path("deep/data").absolute()), "Network is unreachable",
                 "--data.data_dir", "LIT_LIPSCHITZ_DATA"):  # fmt: skip
        assert part in message
    assert list(Path(".").iterdir()) == []


def test_a_download_moves_in_whole(monkeypatch):
    write_idx(Path("mirror"))

    def download(source, folder):
        shutil.copytree("mirror/MNIST", f"{folder}/MNIST")
        if source == "breaks":
            Path(f"{folder}/MNIST/raw/t10k-labels-idx1-ubyte").unlink()

    mnist = sources.SOURCES["MNIST"]
    broken = dataclasses.replace(mnist, download=lambda folder: download("breaks", folder))
    with pytest.raises(DataError, match="downloading failed"):
        broken.fetch(Path("data"), download=True)
    whole = dataclasses.replace(mnist, download=lambda folder: download("works", folder))
    whole.fetch(Path("data"), download=True)
    assert [path.name for path in Path("data").iterdir()] == ["MNIST"]
    assert len(list(Path("data/MNIST/raw").iterdir())) == 4


def test_downloading_can_be_off():
    with pytest.raises(DataError, match="data.download is off"):
        sources.SOURCES["MNIST"].fetch(Path("data"), download=False)


def test_files_that_are_there_are_left_alone(monkeypatch):
    raw = write_idx(Path("."))
    before = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
    monkeypatch.setattr("urllib.request.urlopen", offline)
    sources.SOURCES["MNIST"].fetch(Path("."), download=True)
    assert {path: path.stat().st_mtime_ns for path in raw.iterdir()} == before


def test_a_folder_without_write_permission_is_named():
    Path("data").mkdir()
    Path("data").chmod(0o555)
    code = (
        "from pathlib import Path\nfrom lit_lipschitz.data.sources import SOURCES\n"
        "from lit_lipschitz import DataError\n"
        "try: SOURCES['MNIST'].fetch(Path('data'), download=True)\nexcept DataError as error: print(error)"
    )
    arguments = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        # Root may write anywhere, unless it gives up that capability.
        arguments = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *arguments]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert "MNIST: no permission to write to data (Permission denied); point to a folder" in result.stdout, (
        result.stderr
    )
    assert list(Path("data").iterdir()) == []


def test_a_folder_below_a_file_is_named():
    Path("file").write_text("")
    with pytest.raises(DataError, match=r"the folder file/data can't be made \(Not a directory\)"):
        sources.SOURCES["MNIST"].fetch(Path("file/data"), download=True)


def mnist(**settings):
    if not Path("MNIST").exists():
        write_idx(Path("."))
    module = lit_lipschitz.MNISTDataModule(".", batch_size=4, **settings)
    module.prepare_data()
    for stage in ("fit", "test"):
        module.setup(stage)
    return module


def everything(loader):
    parts = list(loader)
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def test_validation_is_cut_from_the_training_set_by_the_seed():
    reference = datasets.MNIST(write_idx(Path(".")).parent.parent, train=True).data.float()
    module = mnist(val_split=0.2, augment=False)
    val, _ = everything(module.val_dataloader())
    train = module.splits["train"][0]
    assert (len(val), len(train)) == (6, 24)
    pixels = torch.cat([val * 255 * 0.3081 + 255 * 0.1307, train.float()]).squeeze(1)
    assert sorted(pixels.round().sum(dim=(1, 2)).tolist()) == sorted(reference.sum(dim=(1, 2)).tolist())
    assert torch.equal(everything(mnist(val_split=0.2).val_dataloader())[0], val)
    assert not torch.equal(everything(mnist(val_split=0.2, seed=1).val_dataloader())[0], val)


def test_the_official_test_set_is_the_test_set_in_its_order():
    module = mnist()
    images, labels = everything(module.test_dataloader())
    reference = datasets.MNIST(".", train=False)
    assert torch.equal(labels, reference.targets)
    torch.testing.assert_close(images[:, 0], (reference.data / 255 - 0.1307) / 0.3081)
    assert torch.equal(everything(module.predict_dataloader())[0], images)


def test_no_validation_set_when_none_is_wanted():
    assert mnist(val_split=0.0).val_dataloader() == []


def test_a_subset_is_drawn_by_the_seed():
    module = mnist(train_subset=10, val_split=0.2)
    assert (len(module.splits["train"][0]), len(module.splits["val"][0])) == (8, 2)


def test_only_training_images_are_augmented_and_differently_every_epoch():
    module, plain = mnist(), mnist(augment=False)
    first, _ = everything(module.train_dataloader())
    assert not torch.equal(first, everything(plain.train_dataloader())[0])
    assert torch.equal(first, everything(module.train_dataloader())[0])
    assert torch.equal(everything(module.val_dataloader())[0], everything(plain.val_dataloader())[0])


def test_the_environment_says_where_data_are(monkeypatch):
    monkeypatch.setenv("LIT_LIPSCHITZ_DATA", "/some/where")
    assert str(lit_lipschitz.MNISTDataModule().folder) == "/some/where"
    assert str(lit_lipschitz.MNISTDataModule("here").folder) == "here"
    monkeypatch.delenv("LIT_LIPSCHITZ_DATA")
    assert str(lit_lipschitz.MNISTDataModule().folder) == "data"


def test_digits_are_scikit_learns_and_a_fifth_is_for_test():
    module = lit_lipschitz.DigitsDataModule(val_split=0.0)
    module.setup("fit")
    module.setup("test")
    other = lit_lipschitz.DigitsDataModule(seed=5)
    other.setup("test")
    assert (len(module.splits["train"][0]), len(module.splits["test"][0])) == (1437, 360)
    assert torch.equal(module.splits["test"][0], other.splits["test"][0])
    assert torch.bincount(module.splits["test"][1]).min() >= 34
    assert module.splits["train"][0].unique().numel() == 17


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    importing = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(LitLipschitzError, match=r"pip install 'lit-lipschitz\[digits\]'"):
        lit_lipschitz.DigitsDataModule().setup("fit")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"val_split": 1.0}, r"val_split=1\.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"train_subset": 0}, "train_subset=0"),
    ],
)
def test_a_value_out_of_its_range_is_named(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        lit_lipschitz.MNISTDataModule(**settings)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("kind", "counts"), [("MNISTDataModule", (60_000, 10_000)), ("CIFAR10DataModule", (50_000, 10_000))]
)
def test_real_data_are_whole_and_normalised(real_data, kind, counts):
    module = getattr(lit_lipschitz, kind)(str(real_data), verify=False, val_split=0.0)
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    assert (len(module.splits["train"][0]), len(module.splits["test"][0])) == counts
    assert torch.bincount(module.splits["test"][1]).numel() == 10
    images = module._transform(augment=False, device=torch.device("cpu"))(module.splits["train"][0], None)
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-2
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-2


def loaded(kind, folder, stage="fit", **settings):
    data = getattr(lit_lipschitz, kind)(str(folder), download=False, verify=False, batch_size=10, **settings)
    data.setup(stage)
    return data


def test_the_papers_cifar_is_centered_on_the_mean_training_image():
    write_cifar(Path("."))
    pixels, _ = sources.SOURCES["CIFAR10"].load(Path("."), True, verify=False)
    test_pixels, _ = sources.SOURCES["CIFAR10"].load(Path("."), False, verify=False)
    mean = np.mean(pixels.numpy() / 255.0, axis=0)
    data = loaded("CIFAR10DataModule", ".", preprocessing="papers", val_split=0.0)
    images = torch.cat([images for images, _ in data.lipschitz_dataloader()])
    # In an order that the seed's split gives, and not augmented.
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(images.numpy(), pixels.numpy()[order] / 255.0 - mean, atol=1e-6)
    # Also where nothing has read the training set yet.
    alone = loaded("CIFAR10DataModule", ".", "test", preprocessing="papers")
    images = torch.cat([images for images, _ in alone.test_dataloader()])
    np.testing.assert_allclose(images.numpy(), test_pixels.numpy() / 255.0 - mean, atol=1e-6)


def test_the_papers_mnist_is_scaled_and_no_more():
    write_idx(Path("."))
    data = loaded("MNISTDataModule", ".", preprocessing="papers", val_split=0.0)
    (images, _), *_ = data.lipschitz_dataloader()
    assert images.min() == 0
    assert images.max() == 1


def test_the_pass_sees_the_same_batches_every_time_and_training_does_not():
    write_cifar(Path("."))
    data = loaded("CIFAR10DataModule", ".", preprocessing="papers")
    first, second = (torch.cat([i for i, _ in data.lipschitz_dataloader()]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (27, 3, 32, 32)
    assert sum(len(i) for i, _ in data.train_dataloader()) == 20


def test_an_unknown_preprocessing_is_refused():
    with pytest.raises(ConfigurationError, match="preprocessing='keras': expected 'standard' or 'papers'"):
        lit_lipschitz.MNISTDataModule(preprocessing="keras")
