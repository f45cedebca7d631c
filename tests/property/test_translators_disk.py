"""The laws of translation on disk: random bits through any two layouts and degrees come out again.

And damaged files: an error, or nothing but the right tensors.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from tensorpar.files.safetensors_header import DTYPES, TensorSpec, decode, encode
from tensorpar.files.sharded_format import file_name, read_checkpoint
from tensorpar.files.sharded_reading import damaged, opened_sharded
from tensorpar.translators import (
    from_hf,
    hf_to_smdistributed,
    smdistributed_to_hf,
    split,
    to_hf,
)
from tensorpar.translators.assembly import tensors_of
from tensorpar.translators.checkpoint import opened_checkpoint
from tensorpar.translators.converting import Wanted, convert
from tensorpar.translators.stream import Buffer
from tensorpar.translators.tensors import bit_identical
from tests.families import FAMILIES, PLANS_ONLY, FamilyCase
from tests.strategies import dtypes, tiny_configs, world_sizes

every_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
few = settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
layouts = st.sampled_from(["tensorpar", "smdistributed"])


def random_bits(case: FamilyCase, config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A state dict, each tensor once, of any bits: NaNs, infinities and negative zeros too."""
    random = torch.Generator().manual_seed(0)
    once = {id(tensor): (key, tensor) for key, tensor in reversed(case.state_dict(config).items())}
    return {
        key: torch.randint(0, 256, (tensor.numel() * dtype.itemsize,), generator=random)
        .to(torch.uint8)
        .view(dtype)
        .view(tensor.shape)
        for key, tensor in reversed(once.values())
    }


def same_bits(left, right) -> bool:
    return left.keys() == right.keys() and all(bit_identical(left[k], right[k]) for k in left)


@contextmanager
def saved(tensors, config) -> Iterator[Path]:
    """Within: a folder with a folder of Hugging Face's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "hf"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        yield Path(name)


def translated(src: Path, dst: Path, layout: str, degree: int | None) -> Path:
    with opened_checkpoint(src) as source:
        convert(source, dst, Wanted(layout, degree))
    return dst


@every_family
@few
@given(st.data(), layouts, layouts, world_sizes(), world_sizes(), dtypes)
def test_law_disk(case: FamilyCase, data, first, second, a, b, dtype):
    """hf -> any layout at any degree -> any other -> hf is the identity on files."""
    config = data.draw(tiny_configs(case))
    hf = random_bits(case, config, dtype)
    with saved(hf, config) as folder:
        one = translated(folder / "hf", folder / "one", first, a)
        two = translated(one, folder / "two", second, b)
        back = translated(two, folder / "back", "hf", None)
        written = load_file(back / "model.safetensors")
        # smdistributed's tables write a tied head under its own name; that is the embedding again
        extra = {key: written.pop(key) for key in written.keys() - hf.keys()}
        assert same_bits(written, hf)
        embeddings = [tensor for key, tensor in hf.items() if "wte" in key]
        assert all(bit_identical(tensor, embeddings[0]) for tensor in extra.values())


@every_family
@few
@given(st.data(), dtypes)
def test_law_of_odd_tensors(case: FamilyCase, data, dtype):
    """Tensors of any strides, of one common memory, and without elements translate alike."""
    config = data.draw(tiny_configs(case))
    hf = random_bits(case, config, dtype)
    strided = {k: x.new_empty((*x.shape, 2))[..., 0].copy_(x) for k, x in hf.items()}
    memory = torch.cat([x.reshape(-1) for x in hf.values()])
    ends = iter(torch.tensor([x.numel() for x in hf.values()]).cumsum(0).tolist())
    shared = {k: memory[(e := next(ends)) - x.numel() : e].view(x.shape) for k, x in hf.items()}
    empty = {k: x.narrow(0, 0, 0) if is_vocabulary(k) else x for k, x in hf.items()}
    for given_, wanted in ((strided, hf), (shared, hf), (empty, empty)):
        ours = from_hf(given_, config)
        assert same_bits(ours, from_hf(wanted, config))
        assert same_bits(to_hf(ours, config), wanted)
        smd = hf_to_smdistributed(given_, config)
        assert same_bits(smd, hf_to_smdistributed(wanted, config))
        back = smdistributed_to_hf(smd, config)
        assert same_bits({key: back[key] for key in wanted}, wanted)


def is_vocabulary(key: str) -> bool:
    return "wte" in key or "word_embeddings" in key or key.startswith(("lm_head.", "cls.pred"))


@every_family
@settings(max_examples=15)
@given(st.data())
def test_law_strict(case: FamilyCase, data):
    """A key that nobody knows is an error that names it, or passes through both ways."""
    config = data.draw(tiny_configs(case))
    hf = {**case.state_dict(config)}
    known = data.draw(st.sampled_from(sorted(k for k in hf if ".0." in k)))
    hf[f"{known}_scale"] = torch.ones(3)
    with pytest.raises(ValueError, match=f"1 problem: {known}_scale is unknown"):
        hf_to_smdistributed(hf, config)
    smd = hf_to_smdistributed(hf, config, strict=False)
    assert smd[f"{known}_scale"] is hf[f"{known}_scale"]
    back = smdistributed_to_hf(smd, config, strict=False)
    assert back.keys() == hf.keys()
    assert all(torch.equal(back[key], hf[key]) for key in hf)


tensor_specs = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)


@settings(max_examples=60)
@given(tensor_specs, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=1))
def test_law_header(drawn, metadata):
    """Our headers are those of safetensors' own library, byte for byte, and are read back."""
    specs = {
        name: TensorSpec(DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in drawn.items()
    }
    tensors = {name: torch.empty(spec.shape).to(spec.dtype) for name, spec in specs.items()}
    theirs = save(tensors, metadata=metadata or None)
    start = encode(specs, metadata)
    assert theirs.startswith(start)
    header = decode(start, len(theirs))
    assert dict(header.tensors) == specs
    assert dict(header.metadata) == metadata


@pytest.fixture(scope="module")
def damaged_here(tmp_path_factory):
    """A small model in both formats, to be damaged."""
    case = FAMILIES[0]
    config = case.config(layers=1, heads=2, head_size=2, inner=3, vocab=5, positions=2)
    hf = random_bits(case, config, torch.float32)
    folder = tmp_path_factory.mktemp("damage")
    (folder / "hf").mkdir()
    save_file(hf, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    (folder / "hf" / "config.json").write_text(json.dumps(config.to_dict()))
    translated(folder / "hf", folder / "tp", "tensorpar", 3)
    return folder, hf


@contextmanager
def altered(file: Path, content: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans(), st.integers(0, 2))
def test_damaged_sharded_files_are_told(damaged_here, data, cut, rank):
    """Any bit of a header, any lost byte: refused when opened. Any bit of a tensor: named."""
    folder = damaged_here[0] / "tp"
    file = folder / file_name(rank, 3)
    content = file.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    if cut:
        with altered(file, content[: data.draw(st.integers(0, len(content) - 1))]):
            with pytest.raises(ValueError, match="cannot be read"):
                read_checkpoint(folder)
            return
    bit = data.draw(st.one_of(st.integers(0, 8 * first - 1), st.integers(0, 8 * len(content) - 1)))
    with altered(file, flipped(content, bit)):
        if bit // 8 < first:
            with pytest.raises(ValueError, match=r"required|must be"):
                read_checkpoint(folder)
        else:
            with opened_sharded(folder) as files:
                assert len(damaged(files, rank)) == 1
                assert not damaged(files, (rank + 1) % 3)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans())
def test_damaged_hugging_face_files_give_no_wrong_tensor(damaged_here, data, cut):
    """A header is refused, or what it still tells of is right; these files have no checksums."""
    folder, hf = damaged_here
    file = folder / "hf" / "model.safetensors"
    content = file.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    if cut:
        broken = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        broken = flipped(content, data.draw(st.integers(0, 8 * first - 1)))
    with altered(file, broken):
        read = what_can_be_read(folder / "hf")
    assert not (cut and read)
    assert all(bit_identical(tensor, hf[key]) for key, tensor in read.items() if key in hf)


def what_can_be_read(folder: Path) -> dict[str, torch.Tensor]:
    """Nothing where opening is refused."""
    try:
        with opened_checkpoint(folder) as checkpoint:
            found = {}
            for one in tensors_of(checkpoint):
                whole = Buffer().filled(one, range(one.spec.shape[0]))
                found[one.key] = whole.view(one.spec.dtype)
            return found
    except ValueError:
        return {}


@pytest.mark.parametrize("case", PLANS_ONLY, ids=lambda case: case.name)
@few
@given(st.data(), world_sizes(), world_sizes(), dtypes)
def test_law_disk_without_smdistributed(case: FamilyCase, data, a, b, dtype):
    """hf -> tensorpar -> another degree -> hf is the identity; smdistributed is refused."""
    config = data.draw(tiny_configs(case))
    hf = random_bits(case, config, dtype)
    with saved(hf, config) as folder:
        one = translated(folder / "hf", folder / "one", "tensorpar", a)
        two = translated(one, folder / "two", "tensorpar", b)
        back = translated(two, folder / "back", "hf", None)
        assert same_bits(load_file(back / "model.safetensors"), hf)
        with pytest.raises(ValueError, match="smdistributed has no layout for it"):
            translated(folder / "hf", folder / "smd", "smdistributed", 2)
    assert same_bits(to_hf(split(from_hf(hf, config), config, a), config), hf)
    assert split(from_hf(hf, config), config, a)[0].keys() == hf.keys()


def test_what_is_fused_in_gpt_neox(tmp_path):
    """By index arithmetic: row (3 h + b) d of the fused weight is row d of b in head h."""
    case = PLANS_ONLY[0]
    config = case.config(heads=3, head_size=2)
    hf = case.state_dict(config)
    hf["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4)
    ours = from_hf(hf, config)
    assert "gpt_neox.layers.0.attention.bias" not in ours
    for name, num_dims in (("weight", 4), ("bias", 3)):
        key = f"gpt_neox.layers.0.attention.query_key_value.{name}"
        assert ours[key].ndim == num_dims
        for h, b, d in ((0, 0, 0), (1, 2, 1), (2, 0, 1), (2, 2, 0)):
            assert torch.equal(ours[key][h, b, d], hf[key][(h * 3 + b) * 2 + d])


def test_unknown_families_are_copied(tmp_path):
    """Hugging Face to Hugging Face needs no table; other layouts are refused."""
    tensors = {"some.weight": torch.ones(3, 2)}
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "other"}')
    back = translated(tmp_path / "hf", tmp_path / "back", "hf", None)
    assert same_bits(load_file(back / "model.safetensors"), tensors)
    with pytest.raises(ValueError, match="of no known family"):
        translated(tmp_path / "hf", tmp_path / "tp", "tensorpar", 2)
