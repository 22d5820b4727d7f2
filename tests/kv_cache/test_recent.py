# SPDX-License-Identifier: Apache-2.0
"""Pages of the window in vLLM's own KVCacheManager: what steps read is there, no bound is exceeded, nothing stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_capacity,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_ext.kv_cache.backend import make_backend
from vllm_ext.kv_cache.capacity import Geometry, compute_capacity
from vllm_ext.kv_cache.presets import PLAN_NAME, PRESETS, is_mixed
from vllm_ext.kv_cache.recent import RecentManager, RecentSpec
from vllm_ext.kv_cache.recent_layer import RecentLayer
from vllm_ext.kv_cache.settings import choose_presets

MAIN, PAGE, MAX_LEN = 32, 8, 512


def make_spec(window: int, sinks: int, drafts: int = 0) -> RecentSpec:
    return RecentSpec(
        block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.uint8, state_content_bytes=16,
        page_size_padded=256, sliding_window=window, sinks=sinks, draft_tokens=drafts,
    )  # fmt: skip


def make_manager(window: int, sinks: int, blocks: int, enable_caching: bool = True, drafts: int = 0) -> KVCacheManager:
    init_none_hash(sha256)
    main = FullAttentionSpec(block_size=MAIN, num_kv_heads=1, head_size=8, dtype=torch.uint8, state_content_bytes=8)
    groups = [KVCacheGroupSpec(["a"], main), KVCacheGroupSpec(["a.recent"], make_spec(window, sinks, drafts))]
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(
        config, max_model_len=MAX_LEN, scheduler_block_size=MAIN, hash_block_size=PAGE, max_in_flight_tokens=MAX_LEN,
        enable_caching=enable_caching,
    )  # fmt: skip


class Client:
    """One request that is computed in steps of given sizes, as the scheduler would."""

    def __init__(self, manager: KVCacheManager, name: str, tokens: list[int]) -> None:
        self.manager = manager
        self.recent: RecentManager = manager.coordinator.single_type_managers[1]
        hasher = get_request_block_hasher(PAGE, sha256)
        self.request = Request(name, tokens, SamplingParams(max_tokens=1), None, block_hasher=hasher)
        self.started = False
        #: Block and content of every token whose page was real when it was computed.
        self.written: dict[int, int] = {}

    @property
    def computed(self) -> int:
        return int(self.request.num_computed_tokens)

    def step(self, count: int) -> bool:
        """Compute up to `count` tokens; False where blocks are missing."""
        hit_blocks, hit = None, 0
        if not self.started:
            hit_blocks, hit = self.manager.get_computed_blocks(self.request)[:2]
        count = min(count, self.request.num_tokens - self.computed - hit)
        if self.manager.allocate_slots(
            self.request, count, hit, hit_blocks, full_sequence_must_fit=not self.started
        ) is None:  # fmt: skip
            return False
        self.started = True
        self.request.num_computed_tokens += hit
        self.check_readable()
        self.request.num_computed_tokens += count
        return True

    def check_readable(self) -> None:
        """The window before the step's first query, and the sinks, have pages."""
        blocks, spec = self.recent.req_to_blocks[self.request.request_id], self.recent.kv_cache_spec
        first = max(0, self.computed - spec.sliding_window + 1)
        needed = set(range(first, self.computed)) | set(range(min(spec.sinks, self.computed)))
        for position in needed:
            assert not blocks[position // PAGE].is_null, (position, self.computed)

    def count_held(self) -> int:
        blocks = self.recent.req_to_blocks[self.request.request_id]
        return sum(not block.is_null for block in blocks)


windows = st.integers(1, 60)
sinks = st.sampled_from([0, 3, 8, 11])


@given(windows, sinks, st.integers(1, 400), st.lists(st.integers(1, 200), min_size=1, max_size=12), st.booleans())
def test_a_request_alone_in_the_smallest_pool_is_computed(
    window: int, sinks: int, length: int, sizes: list[int], caching: bool
) -> None:
    """The bound that sizes the pool is enough, whatever the steps; and nothing is left behind."""
    spec = make_spec(window, sinks)
    bound = spec.max_admission_blocks_per_request(MAX_LEN, length)
    manager = make_manager(window, sinks, -(-length // MAIN) + bound + 1, caching)
    client = Client(manager, "a", list(range(length)))
    free = manager.block_pool.get_num_free_blocks()
    step = 0
    while client.computed < length:
        assert client.step(sizes[step % len(sizes)])
        # With a prefix cache, more is kept where blocks are free anyway.
        assert caching or client.count_held() <= bound
        step += 1
    manager.free(client.request)
    assert manager.block_pool.get_num_free_blocks() == free
    recent = client.recent
    kept = (recent._first_kept, recent._first_held, recent._shared_prefix)
    for one in (recent.req_to_blocks, recent.num_cached_block, *kept):
        assert not one


def test_a_hit_may_join_pages_of_two_requests() -> None:
    """Why `checks.py` does not ask for the same bytes: quantized pages of the first, the window of the second."""
    manager = make_manager(17, 0, 200)
    clients = [Client(manager, str(number), list(range(length))) for number, length in enumerate((300, 150, 160))]
    blocks = []
    for client in clients:
        assert client.step(300)
        blocks.append(
            [one.req_to_blocks[client.request.request_id] for one in manager.coordinator.single_type_managers]
        )
    # The first kept only the window before its own last boundary, so the second was computed as a whole.
    assert clients[2].request.num_computed_tokens == 160
    quantized, window = (list(zip(*(one[group] for one in blocks), strict=False)) for group in (0, 1))
    assert all(third is first and third is not second for first, second, third in quantized[:4])
    assert all(third is second and third is not first for first, second, third in window[14:16])


@pytest.mark.parametrize("window", [1, 12, 20, 28, 60])
@pytest.mark.parametrize("own", [20, 64, 110, 200])
def test_a_repeated_prefix_does_not_starve_a_request_that_is_alone(window: int, own: int) -> None:
    """All of a hit's blocks may be free ones: keeping more for the cache must never make a request wait for ever."""
    bound = make_spec(window, 5).max_admission_blocks_per_request(MAX_LEN, MAX_LEN)
    manager = make_manager(window, 5, MAX_LEN // MAIN + bound + 1)
    shared = list(range(MAX_LEN - own))
    for number, tokens in enumerate((shared, shared + [1000 + i for i in range(own)])):
        client = Client(manager, str(number), tokens)
        while client.computed < len(tokens):
            assert client.step(MAX_LEN)
        manager.free(client.request)


def test_rejected_drafts_leave_the_window_before_the_next_query() -> None:
    """Also where a step has more drafts than the window has tokens: the pages of those it goes back to are real."""
    manager = make_manager(3, 0, 200, enable_caching=False, drafts=20)
    client = Client(manager, "a", list(range(400)))
    for _ in range(15):
        assert manager.allocate_slots(client.request, 21) is not None
        client.check_readable()
        # One token of the step stays.
        client.request.num_computed_tokens += 1


@pytest.mark.parametrize(("window", "drafts"), [(3, 20), (40, 5)])
def test_drafts_of_a_request_alone_fit_the_smallest_pool(window: int, drafts: int) -> None:
    bound = make_spec(window, 5, drafts).max_admission_blocks_per_request(MAX_LEN, 400)
    manager = make_manager(window, 5, -(-400 // MAIN) + bound + 1, drafts=drafts)
    client = Client(manager, "a", list(range(400)))
    while client.computed < 300:
        assert client.step(100)
    while client.computed + drafts < 400:
        assert manager.allocate_slots(client.request, drafts + 1) is not None
        client.check_readable()
        # One token of the step stays.
        client.request.num_computed_tokens += 1
    manager.free(client.request)


@given(windows, sinks, st.data())
def test_requests_with_common_prefixes_share_pages(window: int, sinks: int, data: Any) -> None:
    """Hits, aborts and scarce blocks in any order: what is read is there, and in the end all blocks are free."""
    manager = make_manager(window, sinks, data.draw(st.integers(40, 200), "blocks"))
    free = manager.block_pool.get_num_free_blocks()
    clients: list[Client] = []
    for number in range(data.draw(st.integers(1, 25), "events")):
        event = data.draw(st.sampled_from(["start", "step", "step", "step", "free"]))
        if event == "start":
            shared = data.draw(st.integers(0, 200))
            tokens = [*range(shared), *(1000 * number + i for i in range(data.draw(st.integers(1, 100))))]
            clients.append(Client(manager, str(number), tokens))
        elif clients:
            client = clients[data.draw(st.integers(0, len(clients) - 1))]
            if event == "free" or client.computed == client.request.num_tokens:
                manager.free(client.request)
                clients.remove(client)
            else:
                client.step(data.draw(st.integers(1, 150)))
    for client in clients:
        manager.free(client.request)
    assert manager.block_pool.get_num_free_blocks() == free
    assert all(block.ref_cnt == 0 for block in manager.block_pool.blocks if not block.is_null)


@pytest.mark.parametrize(("window", "sinks"), [(33, 5), (1, 3), (17, 0)])
def test_a_repeated_prompt_hits_at_the_last_boundary(window: int, sinks: int) -> None:
    """Also where the first run cut it at other places, and computed it as a whole."""
    for sizes in ([300], [50] * 6, [7] * 43):
        manager = make_manager(window, sinks, 200)
        first = Client(manager, "a", list(range(300)))
        for size in sizes:
            assert first.step(size)
        again = Client(manager, "b", list(range(300)))
        assert again.step(1)
        assert again.computed == 289
        manager.free(first.request)
        third = Client(manager, "c", list(range(300)))
        assert third.step(12)
        assert third.computed == 300


@pytest.mark.parametrize("size", [400, 100, 48])
@pytest.mark.parametrize("shared", [128, 150, 256, 300])
def test_the_third_request_with_a_prefix_hits(shared: int, size: int) -> None:
    """A prefix that ends inside a chunk: the second request finds its quantized pages, and keeps the window there."""
    manager = make_manager(33, 5, 300)
    hits = []
    for number in range(4):
        client = Client(manager, str(number), [*range(shared), *(1000 * (number + 1) + i for i in range(90))])
        hits.append(manager.get_computed_blocks(client.request)[1])
        while client.computed < client.request.num_tokens:
            assert client.step(size)
        manager.free(client.request)
    assert hits[0] == 0
    assert hits[2:] == [shared // MAIN * MAIN] * 2


def test_a_search_of_another_request_adds_no_blocks() -> None:
    """A request that does not search (prompt_logprobs) comes after one that found a prefix and did not start."""
    manager = make_manager(33, 5, 300)
    first = Client(manager, "a", list(range(300)))
    assert first.step(300)
    other = Client(manager, "b", [*range(150), *range(1000, 1100)])
    assert manager.get_computed_blocks(other.request)[2] == 128
    manager.free(other.request)
    late = Client(manager, "c", list(range(2000, 2250)))
    assert late.step(250)
    # Sinks, and the windows of the last boundary and of the next step.
    assert late.count_held() == 1 + len(range((224 - 32) // PAGE, -(-250 // PAGE)))
    manager.free(late.request)


def test_freed_blocks_include_those_beside_holes() -> None:
    """vLLM's search for blocks to free ends at the first hole, which every long step leaves behind."""
    manager = make_manager(17, 3, 200)
    client = Client(manager, "a", list(range(400)))
    for _ in range(4):
        assert client.step(100)
        # The window before the step, the boundary's and the next step's: never more.
        assert client.count_held() <= 1 + 3 + 3 + 4
    manager.coordinator.remove_skipped_blocks("a", 400)
    assert client.count_held() == 1 + 2


def test_the_admission_gate_never_asks_for_more_than_the_bound() -> None:
    manager = make_manager(33, 5, 100)
    client = Client(manager, "a", list(range(300)))
    bound = client.recent.max_admission_blocks_per_request
    assert bound == 1 + 2 * (4 + 1)
    arguments = SimpleNamespace(num_tokens=300, total_computed_tokens=0, num_local_computed_tokens=0)
    asked = client.recent.get_num_blocks_to_allocate(
        "a", new_computed_blocks=[], num_tokens_main_model=300, apply_admission_cap=True, **vars(arguments)
    )
    assert asked == bound


#: Tokens over those of bf16 at 32k; the first two are what the presets were made for.
LEAST_RATIO = {
    "skvq_k2v2": 6.5, "skvq_k2v15": 7.0, "kivi_k2v2": 5.5, "kivi_k4v4": 3.2, "kv4": 3.7, "kvquant_k3v3": 4.5,
    "kvplan": 6.0,
}  # fmt: skip


@pytest.mark.parametrize("name", [*PRESETS, PLAN_NAME])
@pytest.mark.parametrize("length", [2048, 32768])
def test_vllms_own_sizing_gives_the_computed_capacity(
    name: str, length: int, tiny_moe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the geometry of the targets, 32 layers with 8 heads of 128, from the specs that our layers declare."""
    config = EngineArgs(model=tiny_moe, max_model_len=2048, enforce_eager=True).create_engine_config()
    monkeypatch.setattr(config.model_config, "max_model_len", length)
    presets = choose_presets(name, None, 128, 32)
    config.cache_config.kv_cache_layout = "BLHNC" if is_mixed(presets) else "LBHNC"
    main = FullAttentionSpec(block_size=128, num_kv_heads=8, head_size=128, dtype=torch.uint8)
    specs: dict[str, Any] = {}
    for i, preset in enumerate(presets):
        backend = make_backend(preset, is_mixed(presets))
        layer = SimpleNamespace(
            layer_name=f"layers.{i}.attn", head_size=128, num_kv_heads=8, attn_backend=backend,
            get_kv_cache_spec=lambda _config: main, impl=SimpleNamespace(dtype=torch.bfloat16, preset=preset),
        )  # fmt: skip
        specs[layer.layer_name] = backend.customize_spec(main)
        if preset.keeps_recent:
            recent = RecentLayer(layer, presets, i == 31, config)
            specs[recent.layer_name] = recent.get_kv_cache_spec(config)
    found = get_kv_cache_configs(config, [specs], [64 << 30])
    expected = compute_capacity(presets, Geometry(32, 8, 128), 64 << 30, length)
    assert found[0].num_blocks == (64 << 30) // expected.page_bytes
    assert get_kv_cache_capacity(config, generate_scheduler_kv_cache_config(found))[0] == expected.tokens
    assert not found[0].needs_kv_cache_zeroing
    if length == 32768:
        assert expected.ratio > LEAST_RATIO[name]
