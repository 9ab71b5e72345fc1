"""The stream inside torch's own machinery: loader workers, StatefulDataLoader, Accelerate."""

import pickle
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dpipe.streams.dataset import open_dataset  # noqa: E402
from dpipe.streams.shard_writing import write_shards  # noqa: E402
from dpipe.streams.stream import StreamSpec, open_stream  # noqa: E402
from dpipe.streams.torch_streams import IterableStream  # noqa: E402
from small_datasets import number_of, write_dataset  # noqa: E402
from torch.utils.data import DataLoader, RandomSampler  # noqa: E402

CAMERA = "observation.images.image"
SPEC = StreamSpec(chunks={"action": 3}, size=(20, 30), torch=True)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = write_dataset(tmp_path_factory.mktemp("torch") / "set", [7, 30, 3, 12], kind="image")
    write_shards(open_dataset(root))
    return root


def make(root: Path, **options) -> IterableStream:
    return IterableStream(open_stream(root, SPEC, batch_size=5, **options))


def indices(batches) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def test_the_loader_gives_tensors_of_the_right_frames(root: Path):
    for batch in DataLoader(make(root), batch_size=None, num_workers=2):
        assert batch[CAMERA].dtype == torch.uint8
        assert [number_of(frame)[0] for frame in batch[CAMERA].numpy()] == batch["index"].tolist()
        assert batch["action"].dtype == torch.float32
        assert len(batch["task"]) == len(batch["index"])


@pytest.mark.parametrize(
    ("workers", "persistent", "context"),
    [
        (0, False, "fork"),
        (1, False, "fork"),
        (2, False, "fork"),
        (3, True, "fork"),
        pytest.param(2, True, "spawn", marks=pytest.mark.slow),
    ],
)
def test_epochs_are_the_same_for_any_number_of_workers(
    root: Path, workers: int, persistent: bool, context: str
):
    stream = open_stream(root, SPEC, batch_size=5)
    expected = [indices(stream) for _ in range(3)]
    loader = DataLoader(
        make(root),
        batch_size=None,
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context=context if workers else None,
    )
    assert len(loader) == 11
    assert [indices(loader) for _ in range(3)] == expected


def test_an_epoch_can_be_chosen_whoever_makes_the_batches(root: Path):
    reference = open_stream(root, SPEC, batch_size=5)
    reference.set_epoch(6)
    expected = indices(reference)
    for workers in (0, 2):
        dataset = make(root)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        indices(loader)
        dataset.set_epoch(6)
        assert indices(loader) == expected


@pytest.mark.parametrize("persistent", [False, True])
def test_a_pass_broken_off_is_begun_again_by_all_workers(root: Path, persistent: bool):
    """Each worker stopped somewhere else; had they gone on from there, samples would be lost and repeated."""
    expected = indices(open_stream(root, SPEC, batch_size=5))
    loader = DataLoader(make(root), batch_size=None, num_workers=2, persistent_workers=persistent)
    for stop in (3, 4):
        source = iter(loader)
        assert [next(source)["index"].tolist() for _ in range(stop)] == expected[:stop]
        del source
    assert indices(loader) == expected


def test_an_endless_loader_runs_on_through_epochs(root: Path):
    stream = open_stream(root, SPEC, batch_size=5)
    endless = stream.endless()
    expected = [next(endless)["index"].tolist() for _ in range(25)]
    loader = iter(DataLoader(IterableStream(stream, endless=True), batch_size=None, num_workers=2))
    assert [next(loader)["index"].tolist() for _ in range(25)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_in_the_middle_of_an_epoch(root: Path, workers: int):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        return stateful.StatefulDataLoader(make(root), batch_size=None, num_workers=workers)

    whole = loader()
    source = iter(whole)
    first = [next(source)["index"].tolist() for _ in range(4)]
    state = pickle.loads(pickle.dumps(whole.state_dict()))
    rest = indices(source)
    second_epoch = indices(whole)
    resumed = loader()
    resumed.load_state_dict(state)
    assert indices(resumed) == rest
    assert sorted(n for found in first + rest for n in found) == list(range(52))
    assert indices(resumed) == second_epoch


def test_loader_workers_killed_and_resumed_with_another_number_of_them(root: Path):
    """A plain DataLoader keeps no state; the batch itself says where the stream stood."""
    dataset = make(root)
    expected = indices(open_stream(root, SPEC, batch_size=5))
    source = iter(DataLoader(dataset, batch_size=None, num_workers=2))
    for _ in range(4):
        batch = next(source)
    state = dataset.stream.state_after(batch)
    del source
    again = make(root)
    again.stream.load_state_dict(state)
    again.resume()
    assert indices(DataLoader(again, batch_size=None, num_workers=3)) == expected[4:]


def test_a_map_style_view_works_with_samplers_and_workers(root: Path):
    view = open_stream(root, SPEC).map_style()
    sampler = RandomSampler(range(len(view)), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(view, batch_size=8, sampler=sampler, num_workers=2)
    seen = []
    for batch in loader:
        seen += batch["index"].tolist()
        assert [number_of(frame)[0] for frame in batch[CAMERA].numpy()] == batch["index"].tolist()
    assert sorted(seen) == list(range(52))


def test_accelerate_prepares_the_loader_of_one_process(root: Path):
    accelerate = pytest.importorskip("accelerate")
    expected = indices(open_stream(root, SPEC, batch_size=5))
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(make(root), batch_size=None))
    assert indices(loader) == expected


def _rank(root: str, folder: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, which was alone
    accelerator = Accelerator()
    stream = open_stream(
        Path(root), SPEC, batch_size=5, rank=accelerator.process_index, world=accelerator.num_processes
    )
    found = [
        n for batch in DataLoader(IterableStream(stream), batch_size=None) for n in batch["index"].tolist()
    ]
    np.save(Path(folder) / f"{accelerator.process_index}-of-{accelerator.num_processes}.npy", found)


@pytest.mark.slow
def test_two_accelerate_processes_share_an_epoch(root: Path, tmp_path: Path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.debug_launcher(_rank, args=(str(root), str(tmp_path)), num_processes=2)
    shares = [np.load(tmp_path / f"{rank}-of-2.npy") for rank in range(2)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(52))
    assert abs(len(shares[0]) - len(shares[1])) <= 5
