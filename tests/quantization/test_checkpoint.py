# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints: round trips at every width and odd shapes, atomic writes, and every damage by message."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.child import run_child
from tests.compress.small_model import edit_config, edit_tensors
from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.quantization import atomic_directory
from vllm_ext.quantization.checkpoint import (
    CheckpointError,
    list_linears,
    list_tensors,
    make_producer,
    open_checkpoint,
    pack_weight,
    read_module,
    unpack_weight,
    validate_checkpoint,
    write_checkpoint,
)
from vllm_ext.quantization.plan import Plan, PlanError
from vllm_ext.quantization.safetensors_io import ShardWriter, TensorInfo, TensorReader, read_header
from vllm_ext.quantization.scheme import Scheme, list_schemes

LINEAR = "model.layers.0.self_attn.o_proj"
EXPERT = "model.layers.0.mlp.experts"
PLAN = {
    LINEAR: "w4a16_g64",
    **{f"{EXPERT}.{e}": {"gate_up": "w3a16_g32", "down": "w2a8_g-1_sym"} for e in range(2)},
    f"{EXPERT}.2": {"gate_up": "w16a16", "down": "w5a16_g32"},
}
SHAPES = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
CONFIG = {"model_type": "qwen3_moe", "num_experts": 3, "hidden_size": 64, "moe_intermediate_size": 96}


def make_tensors(plan: Plan) -> tuple[dict[str, TensorInfo], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Infos and packed tensors of random weights under a plan, and the float32 weights they stand for."""
    torch.manual_seed(0)
    infos = {"model.norm.weight": TensorInfo(torch.bfloat16, (64,))}
    tensors = {"model.norm.weight": torch.ones(64).bfloat16()}
    weights = {}
    for module, schemes in plan.modules.items():
        for path, scheme in list_linears(module, schemes).items():
            weight = torch.randn(SHAPES.get(path.rpartition(".")[2], (48, 64))).bfloat16()
            infos.update(list_tensors(path, scheme, *weight.shape, weight.dtype))
            packed = {"weight": weight}
            weights[path] = weight.float()
            if scheme.is_quantized:
                rounded = round_to_nearest(weight, scheme)
                packed, weights[path] = pack_weight(*rounded, scheme), dequantize(rounded, scheme)
            tensors.update({f"{path}.{suffix}": tensor for suffix, tensor in packed.items()})
    return infos, tensors, weights


def write(output: Path, modules: dict[str, Any] = PLAN, **arguments: Any) -> dict[str, torch.Tensor]:
    plan = Plan(Plan.parse(modules).modules, ("lm_head",), make_producer())
    infos, tensors, weights = make_tensors(plan)
    arguments = {"tensors": tensors.items(), "config": CONFIG, "infos": infos, "model_card": "# card\n", **arguments}
    write_checkpoint(output, plan=plan, **arguments)
    return weights


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write(tmp_path / "packed")
    return tmp_path / "packed"


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = validate_checkpoint(directory)
    found = {}
    for module, schemes in checkpoint.plan.modules.items():
        linears = list_linears(module, schemes)
        for path, tensors in read_module(checkpoint, module).items():
            found[path] = unpack_weight(tensors, linears[path])
    return found


@pytest.mark.parametrize("shard_bytes", [10**9, 4000, 1])
def test_round_trip_in_any_number_of_files(tmp_path: Path, shard_bytes: int) -> None:
    weights = write(tmp_path / "out", shard_bytes=shard_bytes)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (len(files) > 1)
    assert (len(files) == 1) == (shard_bytes == 10**9)
    found = read_weights(tmp_path / "out")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[path], weights[path]) for path in weights)
    # The library reads our files, and sees the same as our reader.
    library = {name: tensor for file in files for name, tensor in load_file(file).items()}
    reader = TensorReader(tmp_path / "out")
    assert library.keys() == reader.infos.keys()
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in library.items())


@settings(max_examples=60)
@given(
    st.sampled_from([name for name in list_schemes() if "a16" in name]),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_every_scheme_round_trips_at_odd_shapes(name: str, N: int, groups: int, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(name)
    K = groups * (scheme.group_size if scheme.group_size > 0 else 64 if scheme.is_ternary else 8)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)).to(dtype)
    packed, expected = {"weight": weight}, weight.float()
    if scheme.is_quantized:
        rounded = round_to_nearest(weight, scheme)
        packed, expected = pack_weight(*rounded, scheme), dequantize(rounded, scheme)
    infos = list_tensors("a", scheme, N, K, dtype)
    plan = Plan({"a": scheme}, (), make_producer())
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(
            Path(folder) / "out",
            plan=plan,
            config={},
            infos=infos,
            tensors=((f"a.{suffix}", tensor) for suffix, tensor in packed.items()),
            model_card="",
        )
        assert torch.equal(read_weights(Path(folder) / "out")["a"], expected)
    expected_size = scheme.stored_bytes(N, K) if scheme.is_quantized else weight.nbytes
    assert size == expected_size


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, shard_bytes=5000)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_companions_are_copied_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    wanted = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json", "LICENSE.txt"]
    left = ["config.json", "model.safetensors.index.json", "train.txt", "x.safetensors", "README.md", "modeling_x.py"]
    for name in [*wanted, *left]:
        (source / name).write_text("source")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("source")
    write(tmp_path / "out", companions=source, config={**CONFIG, "auto_map": {"AutoModel": "modeling_x.X"}})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *wanted, "config.json", "model.safetensors", "README.md", "additional_chat_templates",
    }  # fmt: skip
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "source"
    # No code, and nothing that asks for some.
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "README.md").read_text() == "# card\n"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_output_that_exists_is_refused_and_kept(packed: Path) -> None:
    before = (packed / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"packed exists already: remove it or give another"):
        write(packed)
    assert (packed / "config.json").read_bytes() == before
    empty = packed.parent / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="empty exists already"):
        write(empty)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    plan = Plan(Plan.parse(PLAN).modules, (), make_producer())
    infos, tensors, _ = make_tensors(plan)

    def fail() -> Any:
        yield from list(tensors.items())[:3]
        raise kind("half way")

    with pytest.raises(kind):
        write(tmp_path / "out", tensors=fail(), infos=infos)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic_directory.shutil, "disk_usage", lambda _path: usage._replace(free=100))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, its disk has only 100: free space"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_full_disk_while_writing(repository: Path, tmp_path: Path, shard_bytes: int) -> None:
    """A limit on the size of files fails in the middle of a write, as a full disk does."""
    child = run_child(
        f"""
import json, resource
from pathlib import Path
from tests.quantization.test_checkpoint import write
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    write(Path({str(tmp_path / "out")!r}), shard_bytes={shard_bytes})
    print(json.dumps("written"))
except ValueError as error:
    print(json.dumps(str(error)))
""",
        PYTHONPATH=str(repository),
    )
    assert child.value is not None, child.stderr
    assert "File too large" in child.value
    assert "free" in child.value
    assert "nothing was left behind" in child.value
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    infos = {"a": TensorInfo(torch.float32, (2, 3)), "b": TensorInfo(torch.uint8, (1,))}
    with ShardWriter(tmp_path, infos, 100) as writer:
        writer.write("a", torch.ones(2, 3))
        with pytest.raises(CheckpointError, match="a was written already"):
            writer.write("a", torch.ones(2, 3))
        with pytest.raises(CheckpointError, match="c is not a tensor of this checkpoint"):
            writer.write("c", torch.zeros(1))
        with pytest.raises(CheckpointError, match=r"b is int64 \[1\], expected uint8 \[1\]"):
            writer.write("b", torch.zeros(1, dtype=torch.int64))
        writer.write("b", torch.full((1,), 7, dtype=torch.uint8))
    assert load_file(tmp_path / "model.safetensors")["b"].tolist() == [7]


def test_writer_misses_tensors_that_never_came(tmp_path: Path) -> None:
    infos = {"a": TensorInfo(torch.float32, (2, 3)), "b": TensorInfo(torch.uint8, (1,))}
    with (
        pytest.raises(CheckpointError, match="1 tensors were never written, among them b"),
        ShardWriter(tmp_path, infos, 100) as writer,
    ):
        writer.write("a", torch.ones(2, 3))


def test_producer_is_required(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs a producer"):
        write_checkpoint(tmp_path / "out", plan=Plan({}), config={}, infos={}, tensors=[], model_card="")


QWEIGHT = f"{EXPERT}.1.gate_proj.qweight"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (QWEIGHT, None, r"experts\.1\.gate_proj\.qweight is missing, w3a16_g32 needs qweight, scales, zeros"),
        (QWEIGHT, torch.zeros(96, 25, dtype=torch.uint8), "rows of 25 bytes hold no whole number of 3-bit codes"),
        (QWEIGHT, torch.zeros(96, 15, dtype=torch.uint8), "group size 32 does not divide K=40"),
        (QWEIGHT, torch.zeros(95, 24, dtype=torch.uint8), r"scales is float16 \[96, 2\], expected float16 \[95, 2\]"),
        (QWEIGHT, torch.zeros(96, 24, dtype=torch.int8), r"qweight is int8 \[96, 24\], expected uint8 \[96, 24\]"),
        (QWEIGHT, torch.zeros(24, dtype=torch.uint8), "expected two dimensions"),
        (f"{LINEAR}.scales", torch.zeros(48, 1), r"scales is float32 \[48, 1\], expected float16 \[48, 1\]"),
        (f"{LINEAR}.zeros", None, r"o_proj\.zeros is missing"),
        (f"{LINEAR}.weight", torch.zeros(48, 64), r"o_proj\.weight lies beside the packed .*w4a16_g64"),
        (f"{EXPERT}.0.down_proj.zeros", torch.zeros(64, 1, dtype=torch.uint8), "zeros .* does not belong to the plan"),
        (f"{EXPERT}.7.down_proj.scales", torch.zeros(64, 1), "scales .* does not belong to the plan"),
        (f"{EXPERT}.2.up_proj.weight", torch.zeros(32, 64), r"up_proj \[32, 64\].* gate and up must agree"),
    ],
)
def test_damaged_tensors(packed: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    edit_tensors(packed, **{name: value})
    with pytest.raises(CheckpointError, match=message):
        validate_checkpoint(packed)


def test_renamed_tensor_names_the_nearest(packed: Path) -> None:
    edit_tensors(packed, **{f"{LINEAR}.scales": None, f"{LINEAR}.scale": torch.zeros(48, 1)})
    with pytest.raises(CheckpointError, match=r"o_proj\.scales is missing.*nearest: .*o_proj\.scale\)"):
        validate_checkpoint(packed)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(packed: Path, keep: int) -> None:
    path = packed / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"not a complete safetensors file|is truncated; copy it again"):
        validate_checkpoint(packed)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_by_name(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(len(data).to_bytes(8, "little") + data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_header(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            r"a is uint8 \[2\], 2 bytes from 0.*places it at \[1, 3\]",
        ),
        ({"dtype": "U8", "shape": [3], "data_offsets": [0, 2]}, "3 bytes from 0, but its header places it at"),
        ({"dtype": "U8", "shape": [2], "data_offsets": [0]}, "places it at"),
        ({"dtype": "U8", "shape": [-2], "data_offsets": [0, 2]}, "damaged safetensors header"),
        ({"dtype": "U8", "shape": ["2"], "data_offsets": [0, 2]}, "damaged safetensors header"),
        ({"dtype": "U8", "shape": 2, "data_offsets": [0, 2]}, "damaged safetensors header"),
        ({"dtype": "Q4", "shape": [2], "data_offsets": [0, 2]}, "a has element type 'Q4'; known are BOOL"),
        ({"shape": [2], "data_offsets": [0, 2]}, "damaged safetensors header"),
        (7, "damaged safetensors header"),
    ],
)
def test_hostile_headers(tmp_path: Path, entry: Any, message: str) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "model.safetensors")


def test_missing_shard_and_wrong_index(tmp_path: Path) -> None:
    write(tmp_path / "out", shard_bytes=4000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    shard = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {shard.name}, which"):
        validate_checkpoint(tmp_path / "out")
    shard.write_bytes(kept)
    content = json.loads(index.read_text())
    content["weight_map"]["extra.weight"] = shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"places extra\.weight in model-00002"):
        validate_checkpoint(tmp_path / "out")
    for text, reason in (
        ("{", "Expecting"),
        ('{"weight_map": ["a"]}', "weight_map is a list"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "places a in '../a.safetensors', which is no file name"),
        ('{"weight_map": {"a": 7}}', "places a in 7"),
        ("[" * 100_000, "RecursionError"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=rf"index\.json is damaged .*{reason}"):
            validate_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"version": 2}, PlanError, "version 2, this vllm-ext reads version 1"),
        ({"plan_sha256": "0" * 64}, PlanError, "plan_sha256 is '000"),
        ({"plan": {LINEAR: "w3a16_g64"}}, PlanError, "plan_sha256 is"),
        ({"producer": {}}, CheckpointError, "plan without a producer"),
        ({"quant_method": "gptq"}, CheckpointError, "not a packed mxmoe checkpoint .*'gptq'"),
    ],
)
def test_bad_config(packed: Path, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    edit_config(packed, **changes)
    with pytest.raises(kind, match=message):
        validate_checkpoint(packed)


def test_plan_with_missing_or_extra_experts(packed: Path) -> None:
    fewer = Plan.parse({name: scheme for name, scheme in PLAN.items() if name != f"{EXPERT}.1"})
    edit_config(packed, plan=fewer.to_json(), plan_sha256=fewer.sha256)
    with pytest.raises(PlanError, match=r"names 2 of the 3 experts of .* leaves out .*experts\.1"):
        validate_checkpoint(packed)
    more = Plan.parse({**PLAN, f"{EXPERT}.3": {"gate_up": "w16a16", "down": "w16a16"}})
    edit_config(packed, plan=more.to_json(), plan_sha256=more.sha256)
    with pytest.raises(PlanError, match=r"names .*experts\.3, but the layer has 3 experts"):
        validate_checkpoint(packed)


def test_directories_that_are_no_checkpoint(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path / "nowhere")
    (packed / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        open_checkpoint(packed)
    (packed / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object, got list"):
        open_checkpoint(packed)
    (packed / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        open_checkpoint(packed)


def test_reading_what_is_not_there(packed: Path) -> None:
    checkpoint = validate_checkpoint(packed)
    with pytest.raises(CheckpointError, match=r"does not name .*q_proj \(nearest: .*o_proj\)"):
        read_module(checkpoint, "model.layers.0.self_attn.q_proj")
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        checkpoint.reader.read("nothing")


def test_tensors_outside_the_plan_are_missed(packed: Path) -> None:
    edit_tensors(packed, **{"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing: copy or quantize"):
        validate_checkpoint(packed)


def test_a_source_that_vanishes_is_named(packed: Path, tmp_path: Path) -> None:
    reader = TensorReader(packed)
    (packed / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"reading model\.norm\.weight from .*packed/model\.safetensors failed"):
        reader.read("model.norm.weight")


def test_files_beside_the_one_that_counts_are_not_read(packed: Path) -> None:
    # A copy of the weights under other names, as some repositories carry.
    shutil.copyfile(packed / "model.safetensors", packed / "consolidated.safetensors")
    validate_checkpoint(packed)


@pytest.mark.parametrize("value", ["four", 0, True, 2.5])
def test_a_number_of_experts_that_is_none(packed: Path, value: object) -> None:
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "num_experts": value}))
    with pytest.raises(CheckpointError, match=rf"config\.json has num_experts = {value!r}, expected a size"):
        validate_checkpoint(packed)
