# SPDX-License-Identifier: Apache-2.0
"""Tables of tiles measured per GPU: reading, refusing, and going before the rule."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.kernels.gpu import tuning
from vllm_ext.kernels.gpu.configurations import (
    BLOCKS_PER_PROCESSOR,
    DECODE_TILE,
    LARGE_TILE,
    MIDDLE_TILE,
    Device,
    LayerTiles,
    choose_layer_tiles,
    choose_split,
    choose_tile,
    list_batch_sizes,
    list_choices,
)
from vllm_ext.kernels.gpu.tuning import Split, Step, Table, format_table, parse_table, read_table

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and arm64 processors only")

GPU = Device((9, 0), 132, "Example GPU/1 80GB")
DEEP_TILE = replace(DECODE_TILE, num_stages=6)


def make_table(**changes: Any) -> Table:
    steps = {
        ("mixed_linear", "a16"): (Step(3.5, (DEEP_TILE,)), Step(None, (LARGE_TILE,))),
        ("mixed_moe", "a8"): (Step(10, (DECODE_TILE, DEEP_TILE)),),
    }
    table = Table(GPU.name, importlib.metadata.version("triton"), steps, Split(4, 2, 16))
    return replace(table, **changes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables that is looked through first."""
    monkeypatch.setenv(tuning.FOLDER_ENV, str(tmp_path))
    yield tmp_path
    tuning._find.cache_clear()


def write(folder: Path, table: Table) -> Path:
    path = folder / tuning.name_file(table.gpu)
    path.write_text(format_table(table))
    tuning._find.cache_clear()
    return path


def test_a_table_is_read_as_it_was_written(folder: Path) -> None:
    assert write(folder, make_table()).name == "Example_GPU_1_80GB.json"
    assert tuning.find_table(GPU.name) == make_table()


def test_a_table_goes_before_the_rule(folder: Path) -> None:
    write(folder, make_table())
    assert choose_tile(3, 1, False, GPU) == DEEP_TILE
    assert choose_tile(4, 1, False, GPU) == LARGE_TILE
    assert choose_layer_tiles(8 * 10, 8, True, GPU) == LayerTiles(DECODE_TILE, DEEP_TILE)
    assert choose_split(1, 128 * 64, GPU) == 16
    # What it leaves out: other activations, more rows; and other GPUs.
    assert choose_tile(40, 1, True, GPU) == MIDDLE_TILE
    assert choose_layer_tiles(8 * 40, 8, True, GPU) == LayerTiles(MIDDLE_TILE, MIDDLE_TILE)
    for other in (replace(GPU, name=""), replace(GPU, name="Another")):
        assert choose_tile(3, 1, False, other) == DECODE_TILE
        assert choose_split(1, 128 * 64, other) == 8


def test_batches_for_warming_up_get_every_tile_of_a_table(folder: Path) -> None:
    write(folder, make_table())
    for num_weights in (1, 8):
        listed = {choose_tile(rows, num_weights, False, GPU) for rows in list_batch_sizes(400, num_weights)}
        assert listed == {choose_tile(rows, num_weights, False, GPU) for rows in range(1, 401)}


def test_choices_have_the_tiles_of_a_table(folder: Path) -> None:
    ruled = list_choices(False, GPU)
    assert DEEP_TILE not in ruled
    write(folder, make_table())
    assert set(list_choices(False, GPU)) == {*ruled, DEEP_TILE}


def test_a_table_of_another_triton_is_not_used(folder: Path) -> None:
    write(folder, make_table(triton="2.1.0"))
    with pytest.warns(UserWarning, match=r"measured with triton 2\.1\.0 and is not used"):
        assert choose_tile(3, 1, False, GPU) == DECODE_TILE


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version 2 is not 1"),
        (("gpus",), 1, "unknown entry 'gpus'"),
        (("mixed_linear", "a4"), [], "'a4' is none of a16, a8"),
        (("mixed_linear", "a16", 0, "rows"), None, r"the numbers of rows \[inf, inf\] do not rise"),
        (("mixed_linear", "a16", 0, "rows"), -1, "rows=-1 is neither a positive number nor null"),
        (("mixed_linear", "a16", 0, "down"), {}, "unknown entry 'down' of a step"),
        (("mixed_linear", "a16", 0, "tile", "block_n"), 65, "block_n=65 is not one of 64, 128, 256"),
        (("mixed_linear", "a16", 0, "tile", "num_warps"), "4", "num_warps='4' is not an integer"),
        (("mixed_moe", "a8", 0, "down", "block_tokens"), 64, "both must have the same"),
        (("split", "largest"), 0, "largest=0 is not a positive integer"),
    ],
)
def test_a_broken_table_is_refused_by_name(folder: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    content = json.loads(format_table(make_table()))
    inner = content
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    file = write(folder, make_table())
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        read_table(file)
    assert str(file) in str(raised.value)
    with pytest.raises(ValueError, match="write it again with"):
        choose_tile(3, 1, False, GPU)


@pytest.mark.parametrize("name", ["gpu", "triton", "version"])
def test_a_table_without_its_head_is_refused(folder: Path, name: str) -> None:
    content = json.loads(format_table(make_table()))
    del content[name]
    file = folder / "x.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        read_table(file)


def test_tables_that_come_with_the_pack_can_be_read() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        table = read_table(path)
        assert path.name == tuning.name_file(table.gpu)
        assert parse_table(json.loads(format_table(table))) == table


@given(
    st.builds(Split, st.integers(1, 8), st.integers(1, 16), st.sampled_from((1, 2, 4, 8, 16))),
    st.integers(1, 2000), st.integers(1, 400), st.integers(1, 200),
)  # fmt: skip
def test_a_split_is_never_larger_than_it_may_be(split: Split, blocks: int, chunks: int, processors: int) -> None:
    parts = split.choose(blocks, chunks, processors)
    assert parts <= split.largest
    assert parts == 1 or chunks // parts >= split.fewest_chunks
    # One part fewer would have left processors idle.
    assert parts == 1 or blocks * (parts // 2) < split.blocks_per_processor * processors
    assert asdict(split)["largest"] >= 1


def test_the_rule_is_a_split_of_its_own_constants() -> None:
    assert choose_split(BLOCKS_PER_PROCESSOR * 132, 4096, replace(GPU, name="")) == 1
    assert choose_split(BLOCKS_PER_PROCESSOR * 132 - 1, 4096, replace(GPU, name="")) == 2
