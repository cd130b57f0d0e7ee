from itertools import islice

import numpy as np
import pytest
import torch

from hdit.data import FolderSpec
from hdit.data.batches import Batch, Batches, Layout, dataset_indices
from hdit.data.source import Sample, Skipped


class Numbered:
    """Image i is one pixel of value i with label i % 3; image 4 stands in for a broken file."""

    classes = ("a", "b", "c")

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        skipped = (Skipped("broken.png", "zero bytes"),) if index == 4 else ()
        return Sample(torch.full((1, 1, 1), index, dtype=torch.uint8), index % 3, skipped)


def take(n: int, length: int = 7, *, seed=0, start=0, layout=None, workers=0) -> list[Batch]:
    layout = layout or Layout(batch_size=5)
    return list(
        islice(Batches(Numbered(length), seed=seed, start=start, layout=layout, workers=workers), n)
    )


def images(drawn: list[Batch]) -> list[int]:
    return torch.cat([batch.images for batch in drawn]).flatten().tolist()


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert np.array_equal(a.counters, b.counters)
        assert np.array_equal(a.position, b.position)
        assert a.skipped == b.skipped


def test_batches_of_every_epoch_are_a_permutation():
    # 14 batches of 5 are 10 epochs of 7: batches reach across epochs
    epochs = np.reshape(images(take(14)), (10, 7))
    assert (np.sort(epochs) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_batches_larger_than_the_data_set_hold_several_epochs():
    [batch] = take(1, length=3, layout=Layout(batch_size=12))
    assert (np.sort(np.reshape(images([batch]), (4, 3))) == np.arange(3)).all()


def test_dataset_indices_put_every_image_at_every_place_alike():
    n = 4000
    drawn = dataset_indices(0, np.arange(5 * n), 5).reshape(n, 5)
    counts = np.stack([np.bincount(drawn[:, place], minlength=5) for place in range(5)])
    # binomial with p = 1/5: 5 standard deviations
    assert np.abs(counts - n / 5).max() < 5 * np.sqrt(n * 0.2 * 0.8)


def test_batches_are_labelled_by_their_images_and_counted():
    drawn = take(4, start=35)
    for k, batch in enumerate(drawn):
        assert batch.images.shape == (5, 1, 1, 1)
        assert batch.images.dtype == torch.uint8
        assert batch.labels.dtype == torch.int64
        assert torch.equal(batch.labels, batch.images.flatten().long() % 3)
        assert batch.position.tolist() == [0, 1, 2, 3, 4]
        assert batch.counters.tolist() == list(range(35 + 5 * k, 40 + 5 * k))


def test_batches_do_not_depend_on_the_batch_size():
    assert images(take(6, layout=Layout(batch_size=5))) == images(
        take(3, layout=Layout(batch_size=10))
    )


def test_batches_depend_on_the_seed():
    drawn = {seed: images(take(4, length=20, seed=seed)) for seed in range(5)}
    assert images(take(4, length=20, seed=3)) == drawn[3]
    assert len({tuple(order) for order in drawn.values()}) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resumed_in_the_middle_are_the_later_ones(workers):
    whole = take(9)
    assert_same(take(5, start=20, workers=workers), whole[4:])


@pytest.mark.parametrize(
    ("accumulate", "processes"), [(1, 1), (1, 2), (3, 1), (2, 2), (3, 2), (6, 2)]
)
def test_batches_over_processes_and_steps_are_together_that_of_one_process(accumulate, processes):
    whole = take(4, start=24, layout=Layout(batch_size=12))
    parts = [
        take(
            4 * accumulate,
            start=24,
            layout=Layout(12, accumulate=accumulate, processes=processes, rank=rank),
        )
        for rank in range(processes)
    ]
    for i, batch in enumerate(whole):
        mine = [part for rank in parts for part in rank[i * accumulate : (i + 1) * accumulate]]
        assert {len(part.images) for part in mine} == {12 // (accumulate * processes)}
        position = np.concatenate([part.position for part in mine])
        order = position.argsort()
        assert position[order].tolist() == list(range(12))
        assert np.concatenate([p.counters for p in mine])[order].tolist() == batch.counters.tolist()
        assert torch.equal(torch.cat([part.images for part in mine])[order], batch.images)
        assert torch.equal(torch.cat([part.labels for part in mine])[order], batch.labels)
        assert [skip for part in mine for skip in part.skipped] == batch.skipped


def test_batches_of_worker_processes_are_the_same_in_the_same_order():
    layout = Layout(12, accumulate=2, processes=2, rank=1)
    assert_same(
        take(6, start=12, layout=layout, workers=2), take(6, start=12, layout=layout, workers=0)
    )


def test_batches_name_the_files_that_were_skipped_where_their_stand_in_is():
    drawn = take(7)
    for batch in drawn:
        here = int((batch.images == 4).sum())
        assert batch.skipped == [Skipped("broken.png", "zero bytes")] * here
    assert sum(len(batch.skipped) for batch in drawn) == 5  # once an epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_folder_leave_out_broken_files(tmp_path, workers):
    for name in "abc":
        (tmp_path / f"{name}.ppm").write_bytes(b"P6 1 1 255\n" + name.encode() * 3)
    (tmp_path / "b.ppm").write_bytes(b"")
    source = FolderSpec(path=str(tmp_path), size=1, max_bad_share=0.5).open()
    layout = Layout(batch_size=3)
    for batch in islice(Batches(source, seed=0, start=0, layout=layout, workers=workers), 3):
        # c stands in for b
        assert sorted(batch.images[:, 0].flatten().tolist()) == [ord("a"), ord("c"), ord("c")]
        assert [skipped.path for skipped in batch.skipped] == [str(tmp_path / "b.ppm")]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_neither_read_nor_move_the_global_generator(workers):
    torch.manual_seed(1)
    drawn = take(3, workers=workers)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(2)
    assert_same(take(3, workers=workers), drawn)
